// Users and their balances: what they have, what they owe, and every change of it.

import { patch, post } from "../api.js";
import { debounced, h, put, raw, say } from "../dom.js";
import { icon } from "../icons.js";
import { confirm, copyButton, failureText, heading, trouble } from "../parts.js";
import { full, number, seconds, t, term } from "../text.js";
import { checkField, form, moneyField, textField } from "./forms.js";
import { MOST_SHOWN, act, balanceText, budgetsPanel, countOf, exactly, limitsField, limitsText, listing, money, paged, standing, watching, when } from "./shared.js";

export function screen(context) {
  return context.id === null ? listScreen(context) : oneScreen(context);
}

function listScreen(context) {
  const head = heading(t("gateway.users"), h("button", { type: "button", class: "primary", on: { click: create } }, icon("plus"), h("span", {}, t("users.create"))));
  const error = trouble();
  let needle = context.route.query.get("q") ?? "";
  const list = listing(
    t("gateway.users"),
    [
      ["users.name", (user) => h("a", { href: hrefOf(user), translate: "no" }, h("strong", {}, user.name))],
      ["accounts.state", (user) => [standing(user.status, term("users.status", user.status)), user.is_past_due && h("span", { class: "under owes" }, t("users.owes"))]],
      ["users.balance", (user) => (user.is_billed ? [balanceText(user.balance), Number(user.held) > 0 && h("span", { class: "under" }, t("users.held", { amount: money(user.held) }))] : h("span", { class: "muted" }, t("users.free"))), "number"],
      ["limits.title", (user) => limitsText(user.limits), "wide-cell"],
      ["users.keys", (user) => h("a", { href: `#/gateway/keys?user=${encodeURIComponent(user.id)}` }, number(user.keys)), "number"],
      [null, (user) => h("span", { class: "row-acts" }, buttonsOf(user, context, again)), "acts"],
    ],
    (user) => user.id,
  );
  const search = h("input", { type: "search", autocomplete: "off", spellcheck: "false", value: needle, placeholder: t("users.search"), "aria-label": t("users.search") });
  search.addEventListener(
    "input",
    debounced(() => {
      needle = search.value.trim();
      context.setQuery({ q: needle });
      users.again();
    }, 150),
  );
  const element = h("div", {}, head.element, h("div", { class: "filters" }, h("label", { class: "field search" }, search)), error.element, list.element);
  const users = watching(
    () => `/admin/users?limit=${MOST_SHOWN}${needle === "" ? "" : `&q=${encodeURIComponent(needle)}`}`,
    (found) => {
      list.show(found.users);
      countOf(head, "users.count", found.total, found.users.length);
    },
    error,
  );

  function again() {
    users.again();
  }

  async function create() {
    const done = await form({
      title: t("users.create"),
      fields: [
        textField("name", t("users.name"), { required: true, most: 100, hint: t("users.name.hint") }),
        checkField("is_billed", t("users.billed"), { value: context.session.ledger === "billing", hint: billedHint(context) }),
        limitsField(null),
      ],
      verb: t("users.create.go"),
      wide: true,
      submit: (values) => post("/admin/users", values),
    });
    if (done !== null) users.again();
  }

  users.load();
  return { element, onReconnect: users.again, tick: users.tick, stop: users.stop };
}

function billedHint(context) {
  return t(context.session.ledger === "billing" ? "users.billed.hint" : "users.billed.later");
}

function hrefOf(user) {
  return `#/gateway/users/${encodeURIComponent(user.id)}`;
}

/** What can be done about a user; *again* is called when it was. */
function buttonsOf(user, context, again) {
  const path = `/admin/users/${encodeURIComponent(user.id)}`;

  async function pay(kind) {
    // Made once for each form: whoever presses twice pays once.
    const key = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
    const done = await form({
      title: t(`users.${kind}.title`, { name: user.name }),
      intro: t(`users.${kind}.text`),
      fields: [moneyField("amount", t("users.amount"), { required: true }), textField("reason", t("users.reason"), { required: true, most: 500, hint: t("users.reason.hint") })],
      verb: t(`users.${kind}`),
      submit: (values) => post(`${path}/${kind}`, { ...values, idempotency_key: key }),
    });
    if (done === null) return;
    context.toast(t("users.paid", { name: user.name, amount: exactly(done.balance_after) }));
    again();
  }

  async function edit() {
    const done = await form({
      title: t("users.edit", { name: user.name }),
      fields: [
        textField("name", t("users.name"), { value: user.name, required: true, most: 100, disabled: user.id === "owner" }),
        ...(user.id === "owner" ? [] : [checkField("is_billed", t("users.billed"), { value: user.is_billed, hint: billedHint(context) })]),
        limitsField(user.limits),
      ],
      verb: t("form.save"),
      wide: true,
      submit: (values) => patch(path, changed(user, values)),
    });
    if (done !== null) again();
  }

  async function turn(status) {
    if (status === "suspended") {
      const isMeant = await confirm({ title: t("users.suspend.title", { name: user.name }), text: t("users.suspend.text"), verb: t("users.suspend"), isDangerous: true });
      if (!isMeant) return;
    }
    try {
      await patch(path, { status });
    } catch (failure) {
      context.toast(failureText(failure), "bad");
    }
    again();
  }

  return [
    user.is_billed && act("users.credit", () => pay("credit")),
    user.is_billed && act("users.adjust", () => pay("adjust")),
    act("form.edit", edit),
    user.id !== "owner" && (user.status === "active" ? act("users.suspend", () => turn("suspended"), { kind: "danger-quiet" }) : act("users.activate", () => turn("active"))),
  ];
}

/** Only what differs: the owner's own user has things that stay as they are. */
function changed(user, values) {
  return Object.fromEntries(Object.entries(values).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(user[name])));
}

function oneScreen(context) {
  const path = `/admin/users/${encodeURIComponent(context.id)}`;
  const title = h("h1", { translate: "no" }, t("users.one"));
  const id = h("p", { class: "id" }, raw("code", {}, context.id), " ", copyButton(context.id));
  const buttons = h("div", { class: "actions" });
  const facts = h("dl", { class: "facts panel" });
  const budgets = budgetsPanel();
  const error = trouble();
  const list = listing(
    t("users.entries"),
    [
      ["requests.at", (entry) => h("time", { datetime: entry.at }, full(seconds(entry.at)))],
      ["users.kind", (entry) => term("users.kind", entry.kind) ?? entry.kind],
      ["users.change", (entry) => h("span", { class: entry.amount.startsWith("-") ? null : "plus" }, exactly(entry.amount)), "number"],
      ["users.balance", (entry) => exactly(entry.balance_after), "number"],
      ["users.reason", (entry) => (entry.request_id ? h("a", { href: `#/requests/${encodeURIComponent(entry.request_id)}`, translate: "no" }, h("code", {}, entry.request_id)) : raw("span", {}, entry.reason)), "wide-cell"],
      ["users.actor", (entry) => raw("span", {}, entry.actor)],
    ],
    (entry) => entry.id,
  );
  const entries = paged({ path: (before) => `${path}/entries?limit=50${before === null ? "" : `&before=${encodeURIComponent(before)}`}`, rowsOf: (page) => page.entries, show: list.show });
  const element = h(
    "div",
    {},
    h("p", { class: "back" }, h("a", { href: "#/gateway/users" }, icon("back"), h("span", {}, t("gateway.users")))),
    h("div", { class: "head" }, h("div", { class: "grow" }, title, id), buttons),
    error.element,
    facts,
    budgets.element,
    h("section", { class: "panel", "aria-labelledby": "entries" }, h("h2", { id: "entries" }, t("users.entries")), list.element, entries.element),
  );
  const user = watching(() => path, draw, error);
  const standings = watching(() => `${path}/budgets`, (found) => budgets.show(found.budgets, context.now()), error);

  function draw(found) {
    say(title, found.name);
    context.title(found.name);
    put(buttons, buttonsOf(found, context, again));
    const fact = (name, ...value) => h("div", {}, h("dt", {}, t(name)), h("dd", {}, ...value));
    put(
      facts,
      fact("accounts.state", standing(found.status, term("users.status", found.status))),
      found.is_billed && fact("users.balance", balanceText(found.balance), found.is_past_due && h("span", { class: "under owes" }, t("users.owes"))),
      found.is_billed && fact("users.available", balanceText(found.available)),
      !found.is_billed && fact("users.balance", t("users.free")),
      fact("limits.title", limitsText(found.limits)),
      fact("users.keys", h("a", { href: `#/gateway/keys?user=${encodeURIComponent(found.id)}` }, number(found.keys))),
      fact("users.since", when(found.created_at, context.now())),
      fact("gateway.usage", h("a", { href: `#/gateway/usage?user=${encodeURIComponent(found.id)}` }, t("users.usage"))),
    );
    entries.load();
  }

  function again() {
    user.again();
    standings.again();
  }

  user.load();
  standings.load();
  return {
    element,
    onReconnect: again,
    tick() {
      user.tick();
      standings.tick();
    },
    stop() {
      user.stop();
      standings.stop();
      entries.stop();
    },
  };
}
