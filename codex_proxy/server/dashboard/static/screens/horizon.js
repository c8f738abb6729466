// One timeline of all windows of all accounts: what comes back when, what runs dry, what will be lost unused.

import { debounced, h, keyed, put, raw, say, show, svg } from "../dom.js";
import { stateMark } from "../icons.js";
import { choice, heading, scrollBox, segments, shareBar } from "../parts.js";
import { coarse, collate, full, hour, moment, percent, t, weekday, windowName } from "../text.js";

const HOUR = 3600;
const SPANS = { "12h": 12 * HOUR, "2d": 48 * HOUR, "7d": 168 * HOUR };
const LANE = 18;
const DAY_MINUTES = 24 * 60;
const NARROW = 560;

export function horizonScreen(context) {
  const query = context.route.query;
  const view = {
    span: query.get("span") in SPANS ? query.get("span") : "7d",
    view: query.get("view") === "table" ? "table" : "timeline",
    sort: query.get("sort") === "alias" ? "alias" : "reset",
    q: query.get("q") ?? "",
  };
  let data = null;
  let width = 0;

  const head = heading(t("nav.horizon"));
  head.news.classList.add("sentence");
  head.news.setAttribute("role", "status");
  const search = h("input", { type: "search", autocomplete: "off", spellcheck: "false", value: view.q, placeholder: t("accounts.search"), "aria-label": t("accounts.search") });
  search.addEventListener("input", debounced(() => change({ q: search.value }), 120));
  const spans = segments(t("horizon.span"), [["12h", coarse(SPANS["12h"])], ["2d", coarse(SPANS["2d"])], ["7d", coarse(SPANS["7d"])]], view.span, (span) => change({ span }));
  const views = segments(t("horizon.view"), [["timeline", t("horizon.timeline")], ["table", t("horizon.table")]], view.view, (name) => change({ view: name }));
  const sorting = choice("sort", t("sort"), [["reset", t("horizon.by_reset")], ["alias", t("accounts.alias")]], view.sort, (sort) => change({ sort }));

  const axis = svg("svg", { height: 26, "aria-hidden": "true" });
  const poolLane = svg("svg", { height: 26, "aria-hidden": "true" });
  const list = h("div", {});
  const rows = keyed(list, timelineRow);
  const timeline = h(
    "div",
    { class: "timeline", role: "group" },
    h("div", { class: "line axis" }, h("div", { class: "label" }), h("div", { class: "lanes" }, axis)),
    h("div", { class: "line pool-line" }, h("div", { class: "label" }, t("pool")), h("div", { class: "lanes" }, poolLane)),
    list,
  );
  const legend = h(
    "div",
    { class: "legend" },
    key("horizon.runs", (box) => box.append(svg("rect", { x: 0, y: 1, width: 22, height: 8, class: "run" }))),
    key("horizon.resets", (box) => box.append(svg("line", { x1: 11, x2: 11, y1: 0, y2: 10, class: "reset" }), svg("circle", { cx: 11, cy: 5, r: 3, class: "reset-dot" }))),
    key("horizon.dry", (box) => box.append(svg("rect", { x: 0, y: 1, width: 22, height: 8, class: "dry-back" }), svg("rect", { x: 0, y: 1, width: 22, height: 8, fill: "url(#hatch)" }))),
    key("horizon.lost", (box) => box.append(svg("path", { d: "M11 10L5 0h12z", class: "lost" }))),
  );
  const tableBody = h("tbody", {});
  const table = scrollBox(
    t("nav.horizon"),
    h(
      "table",
      { class: "grid plain", "aria-label": t("nav.horizon") },
      h("thead", {}, h("tr", {}, ["accounts.alias", "horizon.window", "horizon.used", "horizon.reset", "horizon.exhausted", "horizon.unused", "accounts.age"].map((name) => h("th", { scope: "col" }, t(name))))),
      tableBody,
    ),
  );
  const tableRows = keyed(tableBody, windowRow);
  const expiring = h("ul", { class: "expiring" });
  const expiringPanel = h("section", { class: "panel", "aria-labelledby": "expiring", hidden: true }, h("h2", { id: "expiring" }, t("horizon.expiring")), expiring);
  const empty = h("p", { class: "empty", hidden: true }, t("accounts.nothing"));
  const element = h(
    "div",
    {},
    hatches(),
    head.element,
    h("div", { class: "filters" }, h("label", { class: "field search" }, search), spans.element, views.element, sorting.element),
    legend,
    timeline,
    table,
    empty,
    expiringPanel,
  );
  const observer = new ResizeObserver(() => {
    const found = axis.parentElement.clientWidth;
    if (found > 0 && found !== width) {
      width = found;
      draw();
    }
  });
  observer.observe(timeline);

  function change(changes) {
    Object.assign(view, changes);
    context.setQuery({ span: view.span === "7d" ? "" : view.span, view: view.view === "table" ? "table" : "", sort: view.sort === "alias" ? "alias" : "", q: view.q });
    draw();
  }

  function draw() {
    const isTable = view.view === "table";
    show(timeline, !isTable);
    show(legend, !isTable);
    show(spans.element, !isTable);
    show(table, isTable);
    if (data === null) {
      say(head.news, t("loading"));
      return;
    }
    tellPool();
    const needle = view.q.trim().toLowerCase();
    const found = data.accounts.filter((one) => one.alias.toLowerCase().includes(needle));
    const first = (one) => Math.min(Infinity, ...one.windows.map((window) => window.resets_at ?? Infinity));
    const order = new Map(found.map((one) => [one, view.sort === "reset" ? first(one) : 0]));
    found.sort((a, b) => {
      const [x, y] = [order.get(a), order.get(b)];
      return x === y ? collate(a.alias, b.alias) : x - y;
    });
    show(empty, found.length === 0);
    if (isTable) {
      const lines = found.flatMap((one) => one.windows.map((window) => ({ one, window })));
      tableRows.show(lines, ({ one, window }) => `${one.alias} ${window.limit} ${window.window}`);
    } else if (width > 0) {
      const scale = makeScale();
      drawAxis(scale);
      drawPool(scale);
      rows.show(found.map((one) => ({ one, scale })), ({ one }) => one.alias);
    }
    drawExpiring();
  }

  function makeScale() {
    const start = data.at;
    const end = start + SPANS[view.span];
    const x = (at) => Math.round(((Math.min(Math.max(at, start), end) - start) / (end - start)) * width);
    return { start, end, x, width, ticks: ticks(start, end, width) };
  }

  function drawAxis(scale) {
    axis.setAttribute("width", width);
    put(
      axis,
      svg("text", { x: 0, y: 12, class: "tick now" }, t("horizon.now")),
      scale.ticks
        .filter((at) => scale.x(at) > 40)
        .map((at) => [
          svg("line", { x1: scale.x(at), x2: scale.x(at), y1: 18, y2: 26, class: "grid-line" }),
          svg("text", { x: scale.x(at), y: 12, class: "tick", "text-anchor": scale.x(at) > width - 30 ? "end" : "middle" }, isMidnight(at) ? weekday(at) : hour(at)),
        ]),
    );
  }

  function drawPool(scale) {
    const { dry_at: dryAt, back_at: backAt, next_reset: next } = data.pool;
    poolLane.setAttribute("width", width);
    const isDry = dryAt !== null && dryAt < scale.end;
    put(
      poolLane,
      grid(scale, 26),
      svg("rect", { x: 0, y: 7, width: scale.x(isDry ? dryAt : scale.end), height: 12, class: "run pool-run" }),
      isDry && dry(scale.x(dryAt), 7, scale.x(backAt ?? scale.end) - scale.x(dryAt), 12),
      isDry && backAt !== null && backAt < scale.end && svg("rect", { x: scale.x(backAt), y: 7, width: width - scale.x(backAt), height: 12, class: "run pool-run" }),
      next !== null && next < scale.end && reset(scale.x(next), 13, 10),
    );
  }

  function tellPool() {
    const { dry_at: dryAt, back_at: backAt, next_reset: next } = data.pool;
    const parts = [];
    if (dryAt === null) parts.push(t(data.pool.is_known === false ? "horizon.unknown" : "horizon.lasts"));
    else if (dryAt <= data.at) parts.push(t("horizon.is_dry"));
    else parts.push(t("horizon.dry_at", { time: moment(dryAt, data.at), span: coarse(dryAt - data.at) }));
    if (next !== null) parts.push(t("horizon.next", { time: moment(next, data.at), span: coarse(next - data.at) }));
    if (backAt !== null && dryAt !== null) parts.push(t("horizon.back", { time: moment(backAt, data.at) }));
    const text = parts.join(" ");
    say(head.news, text);
    timeline.setAttribute("aria-label", `${t("horizon.picture")} ${text}`);
  }

  function drawExpiring() {
    show(expiringPanel, data.expiring.length > 0);
    put(
      expiring,
      data.expiring.map((one) =>
        h(
          "li",
          {},
          raw("strong", {}, one.alias),
          h("span", { class: "muted" }, h("span", {}, windowName(one.window)), " · ", moment(one.resets_at, data.at)),
          shareBar(one.unused_percent / 100),
        ),
      ),
    );
  }

  draw();
  return {
    element,
    topic: "horizon",
    onEvent(name, found) {
      if (name !== "horizon") return;
      data = found;
      width = axis.parentElement.clientWidth || width;
      draw();
    },
    stop: () => observer.disconnect(),
  };
}

function key(name, make) {
  const box = svg("svg", { class: "swatch", width: 22, height: 10, viewBox: "0 0 22 10", "aria-hidden": "true" });
  make(box);
  return h("span", {}, box, h("span", {}, t(name)));
}

/** Stripes for what is dry, so that it is told apart without its colour. */
function hatches() {
  return svg(
    "svg",
    { width: 0, height: 0, class: "defs", "aria-hidden": "true" },
    svg("defs", {}, svg("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, svg("line", { x1: 0, y1: 0, x2: 0, y2: 6, class: "hatch" }))),
  );
}

function ticks(start, end, width) {
  const wanted = Math.max(2, Math.floor(width / 80));
  const step = [1, 2, 3, 6, 12, 24, 48, 72].find((hours) => (end - start) / (hours * HOUR) <= wanted) ?? 96;
  const found = [];
  const date = new Date(start * 1000);
  const round = Math.min(step, 24);
  date.setHours(Math.ceil((date.getHours() + 0.001) / round) * round, 0, 0, 0);
  while (date / 1000 < end) {
    found.push(date / 1000);
    date.setHours(date.getHours() + step);
  }
  return found;
}

function isMidnight(at) {
  return new Date(at * 1000).getHours() === 0;
}

function grid(scale, height) {
  return scale.ticks.map((at) => svg("line", { x1: scale.x(at), x2: scale.x(at), y1: 0, y2: height, class: "grid-line" }));
}

function dry(x, y, width, height) {
  const size = { x, y, width: Math.max(2, width), height };
  return [svg("rect", { ...size, class: "dry-back" }), svg("rect", { ...size, fill: "url(#hatch)" })];
}

function reset(x, y, half) {
  return [svg("line", { x1: x, x2: x, y1: y - half, y2: y + half, class: "reset" }), svg("circle", { cx: x, cy: y, r: 3.5, class: "reset-dot" })];
}

function timelineRow() {
  const name = raw("a", {});
  const picture = h("span", {});
  const lanes = svg("svg", { "aria-hidden": "true" });
  const row = h("div", { class: "line" }, h("div", { class: "label" }, picture, name), h("div", { class: "lanes" }, lanes));
  let drawn = "";
  return {
    nodes: [row],
    update({ one, scale }) {
      // What moves by less than a pixel is not drawn again.
      const key = JSON.stringify([
        scale.width, scale.ticks.map(scale.x), one.status,
        one.windows.map((w) => [w.window, w.limit, w.used_percent, at(w.resets_at, scale), at(w.projected_exhaustion, scale), Math.round(w.projected_unused_percent ?? -1)]),
      ]);
      if (key === drawn) return;
      drawn = key;
      say(name, one.alias);
      name.href = `#/accounts?q=${encodeURIComponent(one.alias)}`;
      put(picture, stateMark(one.status));
      const height = Math.max(1, one.windows.length) * LANE + 6;
      lanes.setAttribute("width", scale.width);
      lanes.setAttribute("height", height);
      put(lanes, grid(scale, height), one.windows.map((window, place) => lane(window, 3 + place * LANE, scale)));
    },
  };
}

function at(time, scale) {
  return time === null ? null : scale.x(time);
}

function lane(window, y, scale) {
  const title = svg("title", {}, describe(window, scale.start));
  const middle = y + LANE / 2;
  if (window.resets_at === null) {
    return svg("g", {}, title, svg("line", { x1: 0, x2: scale.width, y1: middle, y2: middle, class: "unknown-line" }), svg("text", { x: 4, y: middle - 2, class: "lane-text" }, `${windowName(window.window)} · ${t("unknown")}`));
  }
  const end = scale.x(window.resets_at);
  const isBeyond = window.resets_at > scale.end;
  const left = window.used_percent === null ? null : 100 - window.used_percent;
  const drain = window.projected_exhaustion;
  const parts = [svg("rect", { x: 0, y: y + 2, width: Math.max(2, end), height: LANE - 5, rx: 2, class: "run", "fill-opacity": left === null ? 0.12 : (0.06 + (0.34 * left) / 100).toFixed(2) })];
  if (drain !== null && drain < window.resets_at && drain < scale.end) parts.push(dry(scale.x(drain), y + 2, end - scale.x(drain), LANE - 5));
  else if (left !== null && left <= 0) parts.push(dry(0, y + 2, end, LANE - 5));
  const unused = window.projected_unused_percent;
  // Hours end unused every day; what is lost of a week is worth telling.
  const isLost = unused !== null && unused >= 1 && window.minutes > DAY_MINUTES && !isBeyond;
  if (!isBeyond) {
    parts.push(reset(end, middle - 0.5, LANE / 2 - 2));
    if (isLost) parts.push(svg("path", { d: `M${end} ${middle + 5}l-6.5 -10h13z`, class: "lost" }));
  }
  const words = [windowName(window.window), left === null ? t("unknown") : t("horizon.left", { share: percent(left / 100) })];
  if (isLost && scale.width > NARROW) words.push(t("horizon.unused.short", { share: percent(unused / 100) }));
  const text = words.join(" · ");
  // About how wide it is: in the bar where it fits, else behind it.
  const size = text.length * 6.3;
  const room = drain !== null && drain < window.resets_at ? scale.x(drain) : end;
  const x = room > size + 14 ? 7 : end + 9;
  parts.push(svg("text", { x, y: middle + 3, class: "lane-text" }, text));
  return svg("g", {}, title, parts);
}

function describe(window, now) {
  const parts = [`${window.limit} ${windowName(window.window)}`, t("horizon.used.text", { share: percent(window.used_percent === null ? null : window.used_percent / 100) })];
  if (window.resets_at !== null) parts.push(t("horizon.reset.text", { time: full(window.resets_at), span: coarse(window.resets_at - now) }));
  if (window.projected_exhaustion !== null) parts.push(t("horizon.exhausted.text", { time: full(window.projected_exhaustion) }));
  if (window.projected_unused_percent !== null) parts.push(t("horizon.unused.text", { share: percent(window.projected_unused_percent / 100) }));
  return parts.join("\n");
}

function windowRow() {
  const cells = ["", "", "", "", "", ""].map(() => h("td", {}));
  const name = raw("th", { scope: "row" });
  return {
    nodes: [h("tr", {}, name, cells)],
    update({ one, window }) {
      const now = Date.now() / 1000;
      const when = (time) => (time === null ? t("unknown.sign") : moment(time, now));
      say(name, one.alias);
      say(cells[0], window.limit === "codex" ? windowName(window.window) : `${window.limit} ${windowName(window.window)}`);
      say(cells[1], percent(window.used_percent === null ? null : window.used_percent / 100));
      say(cells[2], when(window.resets_at));
      say(cells[3], when(window.projected_exhaustion));
      say(cells[4], percent(window.projected_unused_percent === null ? null : window.projected_unused_percent / 100));
      say(cells[5], coarse(window.age_seconds));
    },
  };
}
