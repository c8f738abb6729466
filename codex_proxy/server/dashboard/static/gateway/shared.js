// What the places of the gateway share: money, limits, tables that become cards, a screen that loads and looks again.

import { get } from "../api.js";
import { h, keyed, put, raw, say, show } from "../dom.js";
import { icon } from "../icons.js";
import { heading, meter, scrollBox, snippet, trouble } from "../parts.js";
import { coarse, dollars, full, moment, number, seconds, t, term } from "../text.js";
import { choiceField, group, listField, moneyField, numberField } from "./forms.js";

export const WINDOWS = ["5h", "day", "week", "month", "total"];
const ENDPOINTS = ["responses", "chat", "messages", "completions", "edits", "embeddings", "compact", "search", "images"];

const RENEW_MS = 5000;

/** More rows than that nobody reads; the search finds the rest. */
export const MOST_SHOWN = "500";

/** Dollars as they are read: two places, more for what is small; null is no price. */
export function money(text) {
  if (text === null || text === undefined) return t("unknown.sign");
  const value = Number(text);
  const digits = value !== 0 && Math.abs(value) < 1 ? Math.min(9, 2 - Math.floor(Math.log10(Math.abs(value)))) : 2;
  return dollars(value, Math.max(2, digits));
}

/** Dollars to the last place. */
export function exactly(text) {
  return `${text.startsWith("-") ? "-" : ""}$${text.replace("-", "")}`;
}

/** A balance: to a hundredth of a cent, so that one sees a request in it; never more than there is. */
export function balanceText(text) {
  const [whole, places = ""] = text.split(".");
  const isLess = text.startsWith("-") && /[1-9]/.test(places.slice(4));
  const shown = Number(`${whole}.${places.slice(0, 4)}`) - (isLess ? 0.0001 : 0);
  return h("span", { title: exactly(text) }, dollars(shown, 4));
}

/** The same as an element, which says the exact sum when it is asked. */
export function moneyText(text, kind = null) {
  return h("span", { class: kind, title: text === null || text === undefined ? null : exactly(text) }, money(text));
}

/** A moment, in full when it is asked; a dash where there is none. */
export function when(text, now) {
  const at = text === null || text === undefined ? null : Date.parse(text) / 1000;
  return at === null ? h("span", { class: "muted" }, t("unknown.sign")) : h("time", { datetime: text, title: full(at) }, moment(at, now));
}

/** A chip for how something stands: its word, with a mark of its own. */
export function standing(status, words) {
  const signs = { active: "ok", normal: "ok", healthy: "ok", suspended: "pause", disabled: "pause", revoked: "bad", abnormal: "bad", ejected: "bad", refused: "bad", expired: "wait", cooling: "wait", degraded: "warn" };
  return h("span", { class: `standing standing-${status}` }, icon(signs[status] ?? "info", 14), h("span", {}, words ?? status));
}

/** Limits in a line or two. */
export function limitsText(limits) {
  const parts = [];
  if (limits.requests_per_minute !== null) parts.push(t("limits.requests.text", { count: number(limits.requests_per_minute) }));
  if (limits.tokens_per_minute !== null) parts.push(t("limits.tokens.text", { count: number(limits.tokens_per_minute) }));
  if (limits.concurrency !== null) parts.push(t("limits.concurrency.text", { count: number(limits.concurrency) }));
  for (const one of limits.budgets) parts.push(t("limits.budget.text", { amount: money(one.amount), window: term("window", one.window) }));
  const rest = [...limits.models, ...limits.endpoints, ...limits.networks].join(", ");
  if (parts.length === 0 && rest === "") return h("span", { class: "muted" }, t("limits.none"));
  return h("span", {}, parts.join(" · "), rest !== "" && raw("span", { class: "under" }, rest));
}

function hasLimits(limits) {
  return Object.values(limits).some((value) => value !== null && value.length !== 0);
}

/** Fields for limits. */
export function limitsField(limits) {
  const requests = numberField("limits.requests_per_minute", t("limits.requests"), { value: limits?.requests_per_minute, most: 1_000_000, placeholder: t("unlimited") });
  const tokens = numberField("limits.tokens_per_minute", t("limits.tokens"), { value: limits?.tokens_per_minute, placeholder: t("unlimited") });
  const concurrency = numberField("limits.concurrency", t("limits.concurrency"), { value: limits?.concurrency, most: 100_000, placeholder: t("unlimited") });
  const amounts = new Map((limits?.budgets ?? []).map((one) => [one.window, one.amount]));
  const budgets = WINDOWS.map((window) => moneyField("limits.budgets", t("limits.budget", { window: term("window", window) }), { value: amounts.get(window) ?? "", placeholder: t("unlimited") }));
  const models = listField("limits.models", t("limits.models"), { value: limits?.models, hint: t("limits.models.hint"), placeholder: t("all") });
  const endpoints = choiceField("limits.endpoints", t("limits.endpoints"), ENDPOINTS, { value: limits?.endpoints ?? [], hint: t("limits.endpoints.hint") });
  const networks = listField("limits.networks", t("limits.networks"), { value: limits?.networks, hint: t("limits.networks.hint"), placeholder: t("all") });
  return group(t("limits.title"), [requests, tokens, concurrency, ...budgets, models, endpoints, networks], {
    param: "limits",
    isOpen: limits !== null && hasLimits(limits),
    value: () => ({
      requests_per_minute: requests.value(),
      tokens_per_minute: tokens.value(),
      concurrency: concurrency.value(),
      budgets: budgets.map((one, place) => ({ window: WINDOWS[place], amount: one.value() })).filter((one) => one.amount !== null),
      models: models.value(),
      endpoints: endpoints.value(),
      networks: networks.value(),
    }),
  });
}

/**
 * A table whose rows become cards on a narrow screen; only rows that have changed are drawn anew.
 *
 * *columns* are `[key of the label, render(item), class]`; the first one names the row.
 */
export function listing(label, columns, keyOf) {
  const body = h("tbody", { role: "rowgroup" });
  const head = columns.map(([key, , kind]) => h("th", { scope: "col", role: "columnheader", class: kind ?? null }, key === null ? h("span", { class: "visually-hidden" }, t("actions")) : t(key)));
  const table = h("table", { class: "grid listing", role: "table", "aria-label": label }, h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, head)), body);
  const rows = keyed(body, () => {
    const row = h("tr", { role: "row" });
    let shown = "";
    return {
      nodes: [row],
      update(item) {
        const now = JSON.stringify(item);
        if (now === shown) return;
        shown = now;
        put(
          row,
          columns.map(([key, render, kind], place) =>
            h(place === 0 ? "th" : "td", { role: place === 0 ? "rowheader" : "cell", scope: place === 0 ? "row" : null, class: kind ?? null, "data-label": key === null ? null : t(key) }, render(item)),
          ),
        );
      },
    };
  });
  return { element: scrollBox(label, table), table, show: (items) => rows.show(items, keyOf) };
}

/** A button of a row. */
export function act(key, action, { kind = null, label = null } = {}) {
  return h("button", { type: "button", class: kind === null ? "small" : `small ${kind}`, "aria-label": label, on: { click: action } }, t(key));
}

/** Ask for *path()* now and every few seconds, and *draw* what comes. */
export function watching(path, draw, error) {
  let control = null;
  let asked = 0;
  let shown = "";
  async function load() {
    control?.abort();
    const own = (control = new AbortController());
    asked = Date.now();
    try {
      const found = await get(path(), own.signal);
      const key = JSON.stringify(found);
      if (key !== shown) {
        shown = key;
        draw(found);
      }
      error.tell(null);
    } catch (failure) {
      if (failure.name !== "AbortError") error.tell(failure);
    }
  }
  return {
    load,
    /** Draw the next answer even if it is the same. */
    again() {
      shown = "";
      return load();
    },
    tick() {
      if (Date.now() - asked > RENEW_MS && document.querySelector("dialog[open]") === null) load();
    },
    stop: () => control?.abort(),
  };
}

/** A list that is asked for in parts, the newest first: *path(before)*, and what of the answer are its rows. */
export function paged({ path, rowsOf, show }) {
  const error = trouble();
  const more = h("button", { type: "button", hidden: true, on: { click: () => load(wanted) } }, t("requests.more"));
  const empty = h("p", { class: "empty", hidden: true }, t("list.nothing"));
  const control = new AbortController();
  let found = [];
  let wanted = null;
  async function load(before = null) {
    more.disabled = true;
    try {
      const page = await get(path(before), control.signal);
      found = before === null ? rowsOf(page) : [...found, ...rowsOf(page)];
      wanted = page.next;
      show(found);
      say(more, t("requests.more"));
      more.hidden = wanted === null;
      empty.hidden = found.length > 0;
      error.tell(null);
    } catch (failure) {
      if (failure.name !== "AbortError") {
        error.tell(failure);
        // Nothing asks for it by itself.
        wanted = before;
        say(more, t("lost.retry"));
        more.hidden = false;
      }
    }
    more.disabled = false;
  }
  return { load: () => load(), element: h("div", {}, error.element, empty, h("div", { class: "row more-row" }, more)), stop: () => control.abort() };
}

/** How budgets stand; *isHolder* when it is the holder of a key who is told. */
export function budgetsPanel({ isHolder = false } = {}) {
  const element = h("section", { class: "panel", hidden: true, "aria-labelledby": "budgets" });
  return {
    element,
    show(found, now) {
      show(element, found.length > 0);
      put(element, h("h2", { id: "budgets" }, t("own.budgets")), h("div", { class: "windows" }, found.map((one) => budgetLine(one, now, isHolder))));
    },
  };
}

function budgetLine(one, now, isHolder) {
  const bar = meter(term("window", one.window));
  bar.update((100 * Number(one.spent)) / Number(one.amount));
  const end = seconds(one.resets_at);
  return h(
    "div",
    { class: "window-line" },
    h("span", {}, term("window", one.window), isHolder && h("span", { class: "under" }, t(one.of === "key" ? "own.of.key" : "own.of.user"))),
    bar.element,
    h("span", { class: "under" }, t("own.spent", { spent: money(one.spent), amount: money(one.amount) })),
    h("span", { class: "under" }, end === null ? "" : t("window.resets", { span: coarse(end - now) })),
  );
}

/** A key's text, this once. */
export function secretBox(secret) {
  return h("div", { class: "secret" }, h("p", { class: "warn-line" }, icon("warn"), h("span", {}, t("keys.once"))), snippet(secret, t("keys.secret")));
}

/** What stands where there is no ledger. */
export function offScreen(title) {
  const notice = h(
    "section",
    { class: "panel off" },
    h("h2", {}, t("gateway.off")),
    h("p", {}, t("gateway.off.text")),
    snippet("ledger: personal", t("gateway.off")),
    h("p", { class: "muted" }, t("gateway.off.more")),
  );
  return { element: h("div", {}, heading(title).element, notice) };
}

/** Say how many there are, and how many of them are shown if not all. */
export function countOf(head, key, count, shown = count) {
  const words = t(key, { count });
  say(head.news, shown < count ? `${words} · ${t("accounts.shown", { shown: number(shown), total: number(count) })}` : words);
}
