// Client keys: make one, show it once, limit, replace and end them.

import { patch, post } from "../api.js";
import { debounced, h, raw, show } from "../dom.js";
import { icon } from "../icons.js";
import { choice, confirm, dialog, failureText, heading, trouble } from "../parts.js";
import { collate, t, term } from "../text.js";
import { form, momentField, numberField, selectField, textField } from "./forms.js";
import { MOST_SHOWN, act, countOf, limitsField, limitsText, listing, secretBox, standing, watching, when } from "./shared.js";

const STATUSES = ["active", "expired", "revoked"];
const MONTH_SECONDS = 30 * 86400;

export function screen(context) {
  const query = context.route.query;
  const view = { q: query.get("q") ?? "", user: query.get("user") ?? "", status: query.get("status") ?? "active" };
  let users = [];
  const head = heading(t("gateway.keys"), h("button", { type: "button", class: "primary", on: { click: create } }, icon("plus"), h("span", {}, t("keys.create"))));
  const error = trouble();
  const search = h("input", { type: "search", id: "key-search", autocomplete: "off", spellcheck: "false", value: view.q, placeholder: t("keys.search"), "aria-label": t("keys.search") });
  search.addEventListener("input", debounced(() => change({ q: search.value.trim() }), 150));
  const who = choice("key-user", t("users.one"), [["", t("all")]], view.user, (user) => change({ user }));
  const standings = choice("key-status", t("accounts.state"), [["any", t("all")], ...STATUSES.map((one) => [one, t(`keys.status.${one}`)])], view.status, (status) => change({ status }));
  const empty = h("p", { class: "empty", hidden: true }, t("keys.none"));
  const list = listing(
    t("gateway.keys"),
    [
      ["keys.name", (key) => [h("a", { href: `#/gateway/usage?key=${encodeURIComponent(key.id)}`, title: t("keys.usage"), translate: "no" }, h("strong", {}, key.name)), raw("code", { class: "under" }, key.hint)]],
      ["users.one", (key) => h("a", { href: `#/gateway/users/${encodeURIComponent(key.user_id)}`, translate: "no" }, key.user)],
      ["accounts.state", (key) => standing(key.status, term("keys.status", key.status))],
      ["limits.title", (key) => limitsText(key.limits), "wide-cell"],
      ["keys.used", (key) => when(key.last_used_at, context.now())],
      ["keys.expires", (key) => when(key.expires_at, context.now())],
      [null, (key) => key.status !== "revoked" && h("span", { class: "row-acts" }, act("form.edit", () => edit(key)), act("keys.rotate", () => rotate(key)), act("keys.revoke", () => revoke(key), { kind: "danger-quiet" })), "acts"],
    ],
    (key) => key.id,
  );
  const element = h("div", {}, head.element, h("div", { class: "filters" }, h("label", { class: "field search" }, search), who.element, standings.element), error.element, list.element, empty);

  const keys = watching(
    () => `/admin/keys?${new URLSearchParams({ limit: MOST_SHOWN, ...(view.q && { q: view.q }), ...(view.user && { user: view.user }), ...(view.status !== "any" && { status: view.status }) })}`,
    (found) => {
      list.show(found.keys);
      show(empty, found.keys.length === 0);
      countOf(head, "keys.count", found.total, found.keys.length);
    },
    error,
  );
  const people = watching(
    () => "/admin/users",
    (found) => {
      users = found.users.sort((a, b) => collate(a.name, b.name));
      who.fill([["", t("all")], ...users.map((user) => [user.id, user.name, true])], view.user);
    },
    error,
  );

  function change(changes) {
    Object.assign(view, changes);
    context.setQuery({ ...view, status: view.status === "active" ? "" : view.status });
    keys.again();
  }

  async function create() {
    await people.load();
    // The owner never pays: that is no guess to make for somebody who has other users.
    const wanted = view.user || (users.length === 1 ? users[0].id : "");
    const done = await form({
      title: t("keys.create"),
      fields: [
        textField("name", t("keys.name"), { required: true, most: 100, hint: t("keys.name.hint") }),
        selectField("user", t("users.one"), [...(wanted === "" ? [["", t("form.choose")]] : []), ...users.map((user) => [user.id, user.name, true])], { value: wanted, required: true }),
        momentField("expires_at", t("keys.expires"), { hint: t("keys.expires.hint") }),
        limitsField(null),
      ],
      verb: t("keys.create.go"),
      wide: true,
      submit: (values) => post("/admin/keys", values),
    });
    if (done !== null) tellSecret(done);
  }

  function tellSecret({ key, secret }) {
    keys.again();
    dialog(t("keys.made", { name: key.name }), h("div", {}, secretBox(secret), h("div", { class: "dialog-actions" }, h("a", { class: "button", href: "#/setup" }, t("keys.how")))), { wide: true });
  }

  async function edit(key) {
    const done = await form({
      title: t("keys.edit", { name: key.name }),
      fields: [
        textField("name", t("keys.name"), { value: key.name, required: true, most: 100 }),
        momentField("expires_at", t("keys.expires"), { value: key.expires_at, hint: t("keys.expires.hint") }),
        limitsField(key.limits),
      ],
      verb: t("form.save"),
      wide: true,
      submit: (values) => patch(`/admin/keys/${encodeURIComponent(key.id)}`, values),
    });
    if (done !== null) keys.again();
  }

  async function rotate(key) {
    const done = await form({
      title: t("keys.rotate.title", { name: key.name }),
      intro: t("keys.rotate.text"),
      fields: [numberField("grace_seconds", t("keys.grace"), { value: 0, least: 0, most: MONTH_SECONDS, required: true, hint: t("keys.grace.hint") })],
      verb: t("keys.rotate"),
      submit: (values) => post(`/admin/keys/${encodeURIComponent(key.id)}/rotate`, values),
    });
    if (done !== null) tellSecret(done);
  }

  async function revoke(key) {
    const isMeant = await confirm({ title: t("keys.revoke.title", { name: key.name }), text: t("keys.revoke.text"), verb: t("keys.revoke"), isDangerous: true });
    if (!isMeant) return;
    try {
      await post(`/admin/keys/${encodeURIComponent(key.id)}/revoke`);
      context.toast(t("keys.revoked", { name: key.name }));
    } catch (failure) {
      context.toast(failureText(failure), "bad");
    }
    keys.again();
  }

  keys.load();
  people.load();
  return {
    element,
    onReconnect: keys.again,
    tick: keys.tick,
    stop() {
      keys.stop();
      people.stop();
    },
  };
}
