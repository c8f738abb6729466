// How well the prompt caches are hit, by what, and what it costs when a conversation moves.

import { get } from "../api.js";
import { chart } from "../charts.js";
import { h, put, raw, say } from "../dom.js";
import { heading, scrollBox, segments, shareBar, tile, trouble } from "../parts.js";
import { coarse, full, number, percent, short, t, term } from "../text.js";

const HOURS = ["1", "24", "168"];
const RENEW_SECONDS = 15;

// The rule of a turn that stayed where its conversation was: what the others are measured against.
const STAYED = "conversation";
const isMoved = (rule) => rule === "expires first, worth a move" || rule.endsWith(", its own cannot serve");

export function cacheScreen(context) {
  let hours = HOURS.includes(context.route.query.get("hours")) ? context.route.query.get("hours") : "24";
  let control = null;
  let asked = 0;
  let isGone = false;

  const span = segments(t("cache.span"), HOURS.map((one) => [one, coarse(Number(one) * 3600)]), hours, (wanted) => {
    hours = wanted;
    context.setQuery({ hours: hours === "24" ? "" : hours });
    load();
  });
  const head = heading(t("nav.cache"), span.element);
  const error = trouble();
  const tiles = {
    share: tile(t("cache.share"), t("now.cached.hint")),
    cached: tile(t("cache.cached")),
    fresh: tile(t("cache.fresh")),
    turns: tile(t("cache.turns")),
  };
  const course = chart({
    title: t("cache.course"),
    height: 180,
    hasLatest: false,
    bars: true,
    lines: [
      { name: t("chart.tokens.input"), color: "--accent", fill: true },
      { name: t("chart.tokens.cached"), color: "--good" },
    ],
  });
  const moves = h("section", { class: "panel", "aria-labelledby": "moves" });
  const tables = h("div", { class: "panels" });
  const element = h("div", {}, head.element, error.element, h("dl", { class: "tiles four" }, Object.values(tiles).map((one) => one.element)), course.element, moves, tables);
  say(head.news, t("loading"));
  let shown = "";

  async function load() {
    control?.abort();
    control = new AbortController();
    asked = Date.now();
    try {
      const data = await get(`/cache?hours=${hours}`, control.signal);
      if (!isGone) draw(data);
      error.tell(null);
    } catch (failure) {
      if (failure.name !== "AbortError") error.tell(failure);
    }
  }

  function draw(data) {
    const key = JSON.stringify([data, hours]);
    if (key === shown) return;
    shown = key;
    say(head.news, data.since === null ? t("cache.none") : t("cache.since", { time: full(data.since) }));
    const fresh = data.input_tokens - data.cached_tokens;
    tiles.share.update(percent(data.input_tokens > 0 ? data.cached_tokens / data.input_tokens : null, 1));
    tiles.cached.update(short(data.cached_tokens), t("cache.tokens"));
    tiles.fresh.update(short(fresh), t("cache.tokens"));
    tiles.turns.update(short(data.turns));
    course.update(data.series);
    drawMoves(data.by_rule);
    put(
      tables,
      block("cache.by_client", data.by_client),
      block("cache.by_binding", data.by_binding, (name) => (name === "none" || name === "" ? t("request.unbound") : null)),
      block("cache.by_model", data.by_model),
      block("cache.by_account", data.by_account),
      block("cache.by_rule", data.by_rule, (name) => term("rule", name)),
    );
  }

  /** What turns that moved would have found in the cache, had it gone as with those that stayed. */
  function drawMoves(rows) {
    const stayed = rows.find((row) => row.name === STAYED) ?? null;
    const moved = rows.filter((row) => isMoved(row.name));
    const turns = moved.reduce((sum, row) => sum + row.turns, 0);
    const lost = stayed?.cached_share == null ? null : moved.reduce((sum, row) => sum + Math.max(0, stayed.cached_share * row.input_tokens - row.cached_tokens), 0);
    put(
      moves,
      h("h2", { id: "moves" }, t("cache.moves")),
      h("p", {}, turns === 0 ? t("cache.moves.none") : lost === null ? t("cache.moves.unknown", { count: turns }) : t("cache.moves.text", { count: turns, turns: number(turns), tokens: short(lost), share: percent(stayed.cached_share) })),
      h("p", { class: "muted" }, t("cache.moves.how")),
    );
  }

  function block(title, rows, nameOf = () => null) {
    return h(
      "section",
      { class: "panel" },
      h("h2", {}, t(title)),
      rows.length === 0
        ? h("p", { class: "muted" }, t("cache.none"))
        : scrollBox(
            t(title),
            h(
              "table",
              { class: "grid plain", "aria-label": t(title) },
              h("thead", {}, h("tr", {}, [["cache.name", null], ["cache.turns", "number"], ["cache.input", "number"], ["cache.share", null]].map(([name, kind]) => h("th", { scope: "col", class: kind }, t(name))))),
              h(
                "tbody",
                {},
                rows.map((row) =>
                  h(
                    "tr",
                    {},
                    nameOf(row.name) === null ? raw("th", { scope: "row" }, row.name || t("unknown.sign")) : h("th", { scope: "row" }, nameOf(row.name)),
                    h("td", { class: "number" }, number(row.turns)),
                    h("td", { class: "number" }, short(row.input_tokens)),
                    h("td", {}, shareBar(row.cached_share)),
                  ),
                ),
              ),
            ),
          ),
    );
  }

  load();
  return {
    element,
    topic: "cache",
    onReconnect: load,
    tick() {
      if (Date.now() - asked > RENEW_SECONDS * 1000) load();
    },
    stop() {
      isGone = true;
      control?.abort();
      course.stop();
    },
  };
}
