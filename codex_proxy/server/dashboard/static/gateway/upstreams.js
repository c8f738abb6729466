// Upstreams over HTTP beside the accounts: how each does, and what can be changed of those that were added here.

import { patch, post, remove } from "../api.js";
import { h, mark, put, raw, say, show } from "../dom.js";
import { icon } from "../icons.js";
import { confirm, failureText, heading, trouble } from "../parts.js";
import { number, span, t, term } from "../text.js";
import { checkField, choiceField, form, group, listField, numberField, selectField, textField } from "./forms.js";
import { act, countOf, listing, standing, watching, when } from "./shared.js";

const CAPABILITIES = ["responses", "chat", "messages", "completions", "engines", "edits", "embeddings"];

export function screen(context) {
  const check = h("button", { type: "button", on: { click: checkAll } }, t("upstreams.check"));
  const add = h("button", { type: "button", class: "primary", on: { click: () => edit(null) } }, icon("plus"), h("span", {}, t("upstreams.add")));
  const head = heading(t("gateway.upstreams"), check, add);
  const error = trouble();
  const results = h("section", { class: "panel", hidden: true, "aria-labelledby": "checked" });
  const empty = h("p", { class: "empty", hidden: true });
  const list = listing(
    t("gateway.upstreams"),
    [
      ["upstreams.name", (one) => [raw("strong", {}, one.name), raw("span", { class: "under" }, one.base_url)]],
      ["accounts.state", (one) => [standing(stateOf(one), term("upstreams.state", stateOf(one))), raw("span", { class: "under" }, one.enabled ? (one.reason ?? "") : "")]],
      ["upstreams.order", (one) => t("upstreams.order.text", { priority: number(one.priority), weight: number(one.weight, 2) })],
      ["upstreams.speaks", (one) => raw("span", {}, one.capabilities.join(", "))],
      ["setup.models", (one) => raw("span", {}, one.models.map(modelText).join(", ") || t("all"))],
      ["upstreams.checked", (one) => when(one.checked_at, context.now())],
      [null, (one) => buttonsOf(one), "acts"],
    ],
    (one) => one.name,
  );
  const element = h("div", {}, head.element, error.element, results, list.element, empty);
  const upstreams = watching(
    () => "/admin/upstreams",
    (found) => {
      list.show(found.upstreams);
      countOf(head, "upstreams.count", found.upstreams.length);
      show(empty, found.upstreams.length === 0);
      say(empty, t("upstreams.none"));
      show(check, found.upstreams.length > 0);
      add.disabled = !found.can_add;
      mark(add, "title", found.can_add ? null : t("upstreams.config_only"));
    },
    error,
  );

  function buttonsOf(one) {
    return h(
      "span",
      { class: "row-acts" },
      act("upstreams.check.one", (event) => checkOne(one, event.currentTarget)),
      one.is_editable ? [act("form.edit", () => edit(one)), act("action.remove", () => take(one), { kind: "danger-quiet" })] : h("span", { class: "muted", title: t("upstreams.config.hint") }, t("upstreams.config")),
    );
  }

  async function checkAll() {
    check.disabled = true;
    const total = list.table.tBodies[0].rows.length;
    tellResults(t("upstreams.checking", { checked: total, total }), null);
    try {
      const found = await post("/admin/upstreams/health/check");
      tellResults(t("upstreams.checked.text", { checked: found.checked, total: found.total }), found.results);
    } catch (failure) {
      show(results, false);
      error.tell(failure);
    }
    check.disabled = false;
    upstreams.again();
  }

  async function checkOne(one, button = null) {
    if (button !== null) button.disabled = true;
    tellResults(t("upstreams.checking", { checked: 1, total: 1 }), null);
    try {
      const found = await post(`/admin/upstreams/${encodeURIComponent(one.name)}/check`);
      tellResults(t("upstreams.checked.text", { checked: 1, total: 1 }), [found]);
    } catch (failure) {
      show(results, false);
      error.tell(failure);
    }
    if (button !== null) button.disabled = false;
    upstreams.again();
  }

  function tellResults(title, found) {
    show(results, true);
    put(
      results,
      h("h2", { id: "checked", role: "status" }, title),
      found !== null &&
        h(
          "ul",
          { class: "results" },
          found.map((one) =>
            h(
              "li",
              { class: one.state === "normal" ? "good" : "bad" },
              standing(one.state, term("upstreams.result", one.state)),
              " ",
              raw("strong", {}, one.name),
              " ",
              raw("span", {}, one.message),
              one.seconds !== null && h("span", { class: "muted" }, " ", span(one.seconds)),
            ),
          ),
        ),
    );
  }

  async function edit(one) {
    const isNew = one === null;
    const done = await form({
      title: isNew ? t("upstreams.add") : t("upstreams.edit", { name: one.name }),
      fields: [
        textField("name", t("upstreams.name"), { value: one?.name ?? "", required: true, most: 64, hint: isNew ? t("upstreams.name.hint") : "", disabled: !isNew }),
        textField("base_url", t("upstreams.url"), { value: one?.base_url ?? "", required: true, most: 500, type: "url", hint: t("upstreams.url.hint") }),
        textField("api_key", t("upstreams.key"), { type: "password", autocomplete: "new-password", most: 4096, hint: isNew ? t("upstreams.key.hint") : t("upstreams.key.stays") }),
        group(
          t("upstreams.order.title"),
          [
            numberField("priority", t("upstreams.priority"), { value: one?.priority ?? 10, least: -1000, most: 1000, required: true, hint: t("upstreams.priority.hint") }),
            numberField("weight", t("upstreams.weight"), { value: one?.weight ?? 1, least: 0.001, most: 1000, step: "any", required: true }),
            numberField("max_retries", t("upstreams.retries"), { value: one?.max_retries ?? 3, least: 0, most: 10, required: true }),
            numberField("timeout", t("upstreams.timeout"), { value: one?.timeout ?? 120, least: 0.1, most: 86400, step: "any", required: true }),
          ],
          { isOpen: !isNew },
        ),
        choiceField("capabilities", t("upstreams.speaks"), CAPABILITIES, { value: one?.capabilities ?? ["responses", "chat", "embeddings"], hint: t("upstreams.speaks.hint") }),
        listField("models", t("setup.models"), { value: one?.models.map(modelText) ?? [], placeholder: t("all"), hint: t("upstreams.models.hint") }),
        selectField("on_client_disconnect", t("upstreams.leave"), ["drain", "cancel"].map((word) => [word, t(`upstreams.leave.${word}`)]), { value: one?.on_client_disconnect ?? "drain" }),
        checkField("enabled", t("upstreams.enabled"), { value: one?.enabled ?? true }),
      ],
      verb: isNew ? t("upstreams.add") : t("form.save"),
      wide: true,
      submit: (values) => {
        const { name, api_key: key, models, ...rest } = values;
        const said = { ...rest, models: models.map(modelOf), ...(key !== "" && { api_key: key }) };
        return isNew ? post("/admin/upstreams", { name, ...said }) : patch(`/admin/upstreams/${encodeURIComponent(one.name)}`, said);
      },
    });
    if (done === null) return;
    if (isNew) context.toast(t("upstreams.added", { name: done.name }));
    // Whether it works is what one wants to know next.
    if (done.enabled) await checkOne(done);
    else upstreams.again();
  }

  async function take(one) {
    const isMeant = await confirm({ title: t("upstreams.remove.title", { name: one.name }), text: t("upstreams.remove.text"), verb: t("action.remove"), isDangerous: true });
    if (!isMeant) return;
    try {
      await remove(`/admin/upstreams/${encodeURIComponent(one.name)}`);
    } catch (failure) {
      context.toast(failureText(failure), "bad");
    }
    upstreams.again();
  }

  upstreams.load();
  return { element, onReconnect: upstreams.again, tick: upstreams.tick, stop: upstreams.stop };
}

/** One that is switched on and refused our key is no normal one, whatever it is called. */
function stateOf(one) {
  return one.state === "disabled" && one.enabled ? "refused" : one.state;
}

/** A model, or a model and what it is called there, in a line. */
function modelText(model) {
  return typeof model === "string" ? model : Object.entries(model).map(([name, theirs]) => `${name}=${theirs}`).join(", ");
}

function modelOf(text) {
  const [name, theirs] = text.split("=", 2);
  return theirs === undefined || theirs === "" ? name : { [name]: theirs };
}
