// The page of a key's holder: what it used, what it may, what is left; and how to connect.

import { get } from "../api.js";
import { chart } from "../charts.js";
import { h, put, raw, say } from "../dom.js";
import { copyButton, heading, scrollBox, tile, tokensText, trouble } from "../parts.js";
import { full, number, percent, seconds, short, t, term } from "../text.js";
import { clientsPanel } from "../trying.js";
import { balanceText, budgetsPanel, limitsText, listing, money, paged, standing, watching, when } from "./shared.js";
import { costOf } from "./usage.js";

const DAYS = 30;
const DAY_SECONDS = 86400;

export function screen(context) {
  const title = h("h1", { translate: "no" }, t("nav.own"));
  const hint = raw("code", {});
  const error = trouble();
  const facts = h("dl", { class: "facts panel" });
  const budgets = budgetsPanel({ isHolder: true });
  const tiles = { turns: tile(t("usage.turns")), input: tile(t("usage.input")), output: tile(t("usage.output")), cost: tile(t("usage.cost")) };
  const cost = chart({ title: t("usage.cost.days"), height: 160, hasLatest: false, bars: true, days: true, format: (value) => money(String(value)), lines: [{ name: t("usage.cost"), color: "--accent" }] });
  const tokens = chart({ title: t("usage.tokens.days"), height: 160, hasLatest: false, bars: true, days: true, lines: [{ name: t("chart.tokens.input"), color: "--accent" }, { name: t("chart.tokens.cached"), color: "--good" }] });
  const models = h("section", { class: "panel", "aria-labelledby": "own-models" });
  const rows = listing(
    t("usage.rows"),
    [
      ["requests.at", (row) => h("time", { datetime: row.at, title: row.request_id }, full(seconds(row.at)))],
      ["requests.model", (row) => raw("span", {}, row.model)],
      ["usage.input", (row) => tokensText(row.input_tokens, row.cached_tokens), "number"],
      ["usage.output", (row) => number(row.output_tokens), "number"],
      ["usage.cost", (row) => costOf(row), "number"],
    ],
    (row) => row.request_id,
  );
  const latest = paged({ path: (before) => `/own/usage?limit=25${before === null ? "" : `&before=${encodeURIComponent(before)}`}`, rowsOf: (page) => page.usage, show: rows.show });
  const element = h(
    "div",
    {},
    h("div", { class: "head" }, h("div", { class: "grow" }, title, h("p", { class: "id" }, hint))),
    error.element,
    facts,
    budgets.element,
    h("h2", { class: "above" }, t("own.days", { count: DAYS })),
    h("dl", { class: "tiles four" }, Object.values(tiles).map((one) => one.element)),
    h("div", { class: "charts" }, cost.element, tokens.element),
    models,
    h("section", { class: "panel", "aria-labelledby": "own-rows" }, h("h2", { id: "own-rows" }, t("usage.rows")), rows.element, latest.element),
  );
  const own = watching(() => "/own", draw, error);
  let turns = null;

  function draw(found) {
    const { key, user, total } = found;
    say(title, key.name);
    context.title(key.name);
    say(hint, key.hint);
    const fact = (name, ...value) => h("div", {}, h("dt", {}, t(name)), h("dd", {}, ...value));
    put(
      facts,
      fact("accounts.state", standing(key.status, term("keys.status", key.status))),
      user.is_billed && fact("users.balance", balanceText(user.balance), user.is_past_due && h("span", { class: "under owes" }, t("users.owes"))),
      user.is_billed && fact("users.available", balanceText(user.available)),
      fact("own.limits", limitsText(key.limits)),
      fact("own.limits.user", limitsText(user.limits)),
      key.expires_at !== null && fact("keys.expires", when(key.expires_at, context.now())),
      fact("keys.used", when(key.last_used_at, context.now())),
    );
    budgets.show(found.budgets, context.now());
    tiles.turns.update(short(total.turns), total.unpriced > 0 ? t("usage.unpriced", { count: total.unpriced }) : "");
    tiles.input.update(short(total.input_tokens), total.input_tokens > 0 ? t("tokens.share", { share: percent(total.cached_tokens / total.input_tokens) }) : "");
    tiles.output.update(short(total.output_tokens));
    tiles.cost.update(money(total.cost));
    const byDay = new Map(found.days.map((one) => [one.day, one]));
    const last = Math.floor(context.now() / DAY_SECONDS);
    const points = [];
    for (let day = last - DAYS + 1; day <= last; day += 1) points.push([day * DAY_SECONDS, byDay.get(new Date(day * DAY_SECONDS * 1000).toISOString().slice(0, 10)) ?? null]);
    cost.update(points.map(([at, one]) => [at, Number(one?.cost ?? 0)]));
    tokens.update(points.map(([at, one]) => [at, one?.input_tokens ?? 0, one?.cached_tokens ?? 0]));
    put(models, h("h2", { id: "own-models" }, t("cache.by_model")), found.models.length === 0 ? h("p", { class: "muted" }, t("usage.none")) : modelsTable(found.models));
    if (turns !== total.turns) latest.load();
    turns = total.turns;
  }

  function modelsTable(found) {
    return scrollBox(
      t("usage.by.model"),
      h(
        "table",
        { class: "grid plain", "aria-label": t("usage.by.model") },
        h("thead", {}, h("tr", {}, [["requests.model", null], ["usage.turns", "number"], ["usage.input", "number"], ["usage.output", "number"], ["usage.cost", "number"]].map(([key, kind]) => h("th", { scope: "col", class: kind }, t(key))))),
        h("tbody", {}, found.map((one) => h("tr", {}, raw("th", { scope: "row" }, one.model), h("td", { class: "number" }, number(one.turns)), h("td", { class: "number" }, tokensText(one.input_tokens, one.cached_tokens)), h("td", { class: "number" }, number(one.output_tokens)), h("td", { class: "number" }, one.unpriced === one.turns ? t("usage.no_price") : money(one.cost))))),
      ),
    );
  }

  own.load();
  return {
    element,
    onReconnect: own.again,
    tick: own.tick,
    stop() {
      for (const one of [own, latest, cost, tokens]) one.stop();
    },
  };
}

/** How to connect with this key; its text is known to its holder alone. */
export function connectScreen(context) {
  const head = heading(t("nav.connect"));
  const error = trouble();
  const body = h("div", { class: "stack" }, h("p", { class: "muted", role: "status" }, t("loading")));
  const control = new AbortController();
  get("/own/setup", control.signal).then(
    (setup) =>
      put(
        body,
        h(
          "dl",
          { class: "facts panel" },
          h("div", {}, h("dt", {}, t("setup.base")), h("dd", {}, raw("code", {}, setup.base_url), " ", copyButton(setup.base_url))),
          h("div", { class: "wide" }, h("dt", {}, t("setup.models")), raw("dd", { class: "models" }, setup.models.map((name) => h("code", {}, name)))),
        ),
        h("section", { class: "panel", "aria-labelledby": "clients" }, h("h2", { id: "clients" }, t("setup.clients")), clientsPanel(setup, context.route.query.get("client"), (client) => context.setQuery({ client })).element),
      ),
    (failure) => {
      if (failure.name === "AbortError") return;
      put(body);
      error.tell(failure);
    },
  );
  return { element: h("div", {}, head.element, error.element, body), onQuery: () => {}, stop: () => control.abort() };
}
