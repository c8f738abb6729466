// What was used, and what it costs: by key, user, model and day, in tokens and in money.

import { chart } from "../charts.js";
import { h, put, raw, say } from "../dom.js";
import { choice, heading, scrollBox, segments, tile, tokensText, trouble } from "../parts.js";
import { collate, coarse, full, number, percent, seconds, short, t } from "../text.js";
import { listing, money, moneyText, paged, watching } from "./shared.js";

const DAYS = ["1", "7", "30", "90"];
const GROUPS = ["key", "user", "model", "day"];
const DAY_SECONDS = 86400;

export function screen(context) {
  const query = context.route.query;
  const view = {
    days: DAYS.includes(query.get("days")) ? query.get("days") : "30",
    by: GROUPS.includes(query.get("by")) ? query.get("by") : "key",
    user: query.get("user") ?? "",
    key: query.get("key") ?? "",
    model: query.get("model") ?? "",
  };
  const span = segments(t("cache.span"), DAYS.map((days) => [days, coarse(Number(days) * DAY_SECONDS)]), view.days, (days) => change({ days }));
  const head = heading(t("gateway.usage"), span.element);
  const error = trouble();
  const who = choice("usage-user", t("users.one"), [["", t("all")]], view.user, (user) => change({ user }));
  const keys = choice("usage-key", t("keys.one"), [["", t("all")]], view.key, (key) => change({ key }));
  const models = choice("usage-model", t("requests.model"), [["", t("all")]], view.model, (model) => change({ model }));
  const tiles = { turns: tile(t("usage.turns")), input: tile(t("usage.input")), output: tile(t("usage.output")), cost: tile(t("usage.cost"), t("usage.cost.hint")) };
  const cost = chart({ title: t("usage.cost.days"), height: 170, hasLatest: false, bars: true, days: true, format: (value) => money(String(value)), lines: [{ name: t("usage.cost"), color: "--accent" }] });
  const tokens = chart({ title: t("usage.tokens.days"), height: 170, hasLatest: false, bars: true, days: true, lines: [{ name: t("chart.tokens.input"), color: "--accent" }, { name: t("chart.tokens.cached"), color: "--good" }] });
  const group = segments(t("usage.by"), GROUPS.map((one) => [one, t(`usage.by.${one}`)]), view.by, (by) => change({ by }));
  const sumsLink = h("a", { class: "button", download: "" }, t("usage.csv"));
  const rowsLink = h("a", { class: "button", download: "" }, t("usage.csv.rows"));
  const table = h("div", {});
  const rows = listing(
    t("usage.rows"),
    [
      ["requests.at", (row) => h("a", { href: `#/requests/${encodeURIComponent(row.request_id)}`, title: row.request_id }, full(seconds(row.at)))],
      ["keys.one", (row) => [raw("span", {}, row.key), row.user !== row.key && raw("span", { class: "under" }, row.user)]],
      ["requests.model", (row) => [raw("span", {}, row.model), row.tier !== "standard" && row.tier !== "" && raw("span", { class: "under" }, row.tier)]],
      ["usage.input", (row) => tokensText(row.input_tokens, row.cached_tokens), "number"],
      ["usage.output", (row) => number(row.output_tokens), "number"],
      ["usage.cost", (row) => costOf(row), "number"],
      ["usage.target", (row) => raw("span", {}, row.target || t("unknown.sign"))],
    ],
    (row) => row.request_id,
  );
  const latest = paged({ path: (before) => `/admin/usage?${asks({ limit: "50", before: before ?? "" })}`, rowsOf: (page) => page.usage, show: rows.show });
  const element = h(
    "div",
    {},
    head.element,
    h("div", { class: "filters" }, who.element, keys.element, models.element),
    error.element,
    h("dl", { class: "tiles four" }, Object.values(tiles).map((one) => one.element)),
    h("div", { class: "charts" }, cost.element, tokens.element),
    h("section", { class: "panel", "aria-labelledby": "sums" }, h("div", { class: "filters" }, h("h2", { id: "sums" }, t("usage.sums")), group.element, h("span", { class: "grow" }), sumsLink, rowsLink), table),
    h("section", { class: "panel", "aria-labelledby": "rows" }, h("h2", { id: "rows" }, t("usage.rows")), rows.element, latest.element),
  );

  /** The present filters, as a query. */
  function asks(more = {}) {
    const since = new Date((Math.floor(context.now() / DAY_SECONDS) - Number(view.days) + 1) * DAY_SECONDS * 1000).toISOString();
    const wanted = { since, user: view.user, key: view.key, model: view.model, ...more };
    return new URLSearchParams(Object.entries(wanted).filter(([, value]) => value !== ""));
  }

  const days = watching(() => `/admin/usage/sums?${asks({ by: "day" })}`, drawDays, error);
  const sums = watching(() => `/admin/usage/sums?${asks({ by: grouping() })}`, drawSums, error);
  const people = watching(() => "/admin/users", (found) => who.fill([["", t("all")], ...named(found.users).map((user) => [user.id, user.name, true])], view.user), error);
  const served = watching(
    () => "/admin/usage/sums?by=model",
    (found) => models.fill([["", t("all")], ...[...new Set([...found.sums.map((one) => one.model), view.model])].filter((name) => name !== "").sort(collate).map((name) => [name, name, true])], view.model),
    error,
  );
  const owned = watching(() => "/admin/keys", (found) => keys.fill([["", t("all")], ...named(found.keys).map((key) => [key.id, `${key.name} (${key.user})`, true])], view.key), error);

  // A key is told with its user's name.
  function grouping() {
    return view.by === "key" ? "user,key" : view.by;
  }

  function drawDays(found) {
    const total = found.total;
    tiles.turns.update(short(total.turns), total.unpriced > 0 ? t("usage.unpriced", { count: total.unpriced }) : "");
    tiles.input.update(short(total.input_tokens), total.input_tokens > 0 ? t("tokens.share", { share: percent(total.cached_tokens / total.input_tokens) }) : "");
    tiles.output.update(short(total.output_tokens));
    tiles.cost.update(money(total.cost), Number(total.shortfall) > 0 ? t("usage.shortfall", { amount: money(total.shortfall) }) : "");
    const byDay = new Map(found.sums.map((one) => [one.day, one]));
    const last = Math.floor(context.now() / DAY_SECONDS);
    const points = [];
    for (let day = last - Number(view.days) + 1; day <= last; day += 1) points.push([day * DAY_SECONDS, byDay.get(new Date(day * DAY_SECONDS * 1000).toISOString().slice(0, 10)) ?? null]);
    cost.update(points.map(([at, one]) => [at, one === null ? 0 : Number(one.cost)]));
    tokens.update(points.map(([at, one]) => [at, one?.input_tokens ?? 0, one?.cached_tokens ?? 0]));
  }

  function drawSums(found) {
    put(table, found.sums.length === 0 ? h("p", { class: "empty" }, t("usage.none")) : sumsTable(found.sums));
  }

  function sumsTable(found) {
    const isDay = view.by === "day";
    const ordered = [...found].sort((a, b) => (isDay ? b.day.localeCompare(a.day) : Number(b.cost) - Number(a.cost) || b.input_tokens - a.input_tokens));
    const number_ = (text) => h("td", { class: "number" }, text);
    return scrollBox(
      t("usage.sums"),
      h(
        "table",
        { class: "grid plain", "aria-label": t("usage.sums") },
        h("thead", {}, h("tr", {}, [[`usage.by.${view.by}`, null], ["usage.turns", "number"], ["usage.input", "number"], ["usage.output", "number"], ["usage.cost", "number"]].map(([key, kind]) => h("th", { scope: "col", class: kind }, t(key))))),
        h("tbody", {}, ordered.map((one) => h("tr", {}, raw("th", { scope: "row" }, nameOf(one)), number_(number(one.turns)), number_(tokensText(one.input_tokens, one.cached_tokens)), number_(number(one.output_tokens)), h("td", { class: "number" }, costOfSum(one))))),
      ),
    );
  }

  function nameOf(one) {
    if (view.by === "key") return `${one.key} (${one.user})`;
    return (view.by === "user" ? one.user : one[view.by]) || t("unknown.sign");
  }

  function change(changes) {
    Object.assign(view, changes);
    context.setQuery({ ...view, days: view.days === "30" ? "" : view.days, by: view.by === "key" ? "" : view.by });
    load();
  }

  function load() {
    sumsLink.href = `/ui/api/admin/usage/sums.csv?${asks({ by: grouping() })}`;
    rowsLink.href = `/ui/api/admin/usage.csv?${asks()}`;
    days.again();
    sums.again();
    latest.load();
  }

  say(head.news, t("usage.utc"));
  load();
  people.load();
  owned.load();
  served.load();
  return {
    element,
    onReconnect: load,
    tick() {
      days.tick();
      sums.tick();
    },
    stop() {
      for (const one of [days, sums, people, owned, served, latest, cost, tokens]) one.stop();
    },
  };
}

/** What a turn costs; without a price it says so. */
export function costOf(row) {
  if (row.cost === null) return h("span", { class: "muted" }, t("usage.no_price"));
  return [moneyText(row.cost), row.source !== "backend" && h("span", { class: "under" }, t("usage.estimated")), Number(row.shortfall) > 0 && h("span", { class: "under owes" }, t("usage.shortfall", { amount: money(row.shortfall) }))];
}

function costOfSum(one) {
  if (one.unpriced === one.turns) return h("span", { class: "muted" }, t("usage.no_price"));
  return [moneyText(one.cost), one.unpriced > 0 && h("span", { class: "under" }, t("usage.unpriced", { count: one.unpriced }))];
}

function named(found) {
  return [...found].sort((a, b) => collate(a.name, b.name));
}
