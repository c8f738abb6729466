// Is it fine? The figures of the last minute, their course, and what needs somebody.

import { get } from "../api.js";
import { chart } from "../charts.js";
import { h, keyed, put, raw, say, show } from "../dom.js";
import { icon, stateMark } from "../icons.js";
import { alertName, heading, tile } from "../parts.js";
import { coarse, moment, number, percent, short, span, t } from "../text.js";

const STATES = ["active", "cooldown", "unavailable", "needs_login", "disabled"];
const KEPT_POINTS = 1800;

export function nowScreen(context) {
  const head = heading(t("nav.now"));
  const verdict = h("p", { class: "verdict", role: "status" });
  head.news.replaceWith(verdict);
  const tiles = {
    in_flight: tile(t("now.in_flight"), t("now.in_flight.hint")),
    rate: tile(t("now.rate"), t("now.rate.hint")),
    tokens: tile(t("now.tokens"), t("now.tokens.hint")),
    errors: tile(t("now.errors"), t("now.errors.hint")),
    first: tile(t("now.first"), t("now.first.hint")),
    cached: tile(t("now.cached"), t("now.cached.hint")),
    lag: tile(t("now.lag"), t("now.lag.hint")),
    up: tile(t("now.up")),
  };
  const charts = {
    requests: chart({
      title: t("chart.requests"), hint: t("chart.per_second"), seconds: true,
      lines: [
        { name: t("chart.requests.all"), color: "--accent", fill: true },
        { name: t("chart.requests.errors"), color: "--bad" },
      ],
    }),
    tokens: chart({
      title: t("chart.tokens"), hint: t("chart.per_second"), seconds: true,
      lines: [
        { name: t("chart.tokens.input"), color: "--accent", fill: true },
        { name: t("chart.tokens.cached"), color: "--good" },
        { name: t("chart.tokens.output"), color: "--warm" },
      ],
    }),
    first: chart({
      title: t("chart.first"), seconds: true, format: span,
      lines: [{ name: t("chart.median"), color: "--accent" }],
    }),
    lag: chart({
      title: t("chart.lag"), seconds: true, format: span,
      lines: [{ name: t("chart.most"), color: "--accent" }],
    }),
  };
  const strip = h("div", { class: "strip", "aria-hidden": "true" });
  const legend = h("ul", { class: "states" });
  const recent = h("ul", { class: "events" });
  const recentPanel = h("section", { class: "panel", "aria-labelledby": "recent", hidden: true }, h("h2", { id: "recent" }, t("alerts.recent")), recent);
  const element = h(
    "div",
    {},
    head.element,
    h("dl", { class: "tiles" }, Object.values(tiles).map((one) => one.element)),
    h("section", { class: "panel", "aria-labelledby": "pool-now" }, h("h2", { id: "pool-now" }, t("now.accounts")), strip, legend),
    h("div", { class: "charts" }, Object.values(charts).map((one) => one.element)),
    recentPanel,
  );

  const parts = new Map(
    STATES.map((status) => {
      const bar = h("span", { class: `part state-${status}` });
      const count = h("b", {});
      const row = h("li", {}, h("a", { href: `#/accounts?status=${status}` }, stateMark(status), h("span", {}, t(`state.${status}`)), " ", count));
      strip.append(bar);
      legend.append(row);
      return [status, { bar, count, row }];
    }),
  );
  const alertRows = keyed(recent, (first) => {
    const name = alertName(first.name);
    const text = raw("span", {});
    const when = h("span", { class: "muted" });
    return {
      nodes: [h("li", {}, icon("bell", 14), name, " ", text, " ", when)],
      update(one) {
          say(text, one.text);
        const end = one.resolved_at === null ? t("alerts.still") : moment(one.resolved_at, context.now());
        say(when, `${moment(one.since, context.now())} – ${end}`);
      },
    };
  });

  let points = [];
  let firing = "";
  let step = 2;

  async function askRecent() {
    try {
      const found = await get("/alerts");
      show(recentPanel, found.recent.length > 0);
      alertRows.show(found.recent, (one) => `${one.name} ${one.since}`);
    } catch {
      // Shown again with the next visit; the connection's banner says what is wrong.
    }
  }
  askRecent();

  function onNow(data) {
    const { accounts } = data;
    tell(verdict, data);
    const names = data.alerts.map((one) => `${one.name} ${one.since}`).join();
    if (names !== firing) {
      firing = names;
      askRecent();
    }
    tiles.in_flight.update(number(data.in_flight), t("now.in_flight.more", { streams: data.streams, queued: data.queued }));
    tiles.rate.update(short(data.requests_per_second), t("now.rate.more"));
    const { input, cached, output } = data.tokens_per_second;
    tiles.tokens.update(short(sum(input, output)), t("now.tokens.more", { input: short(input), cached: short(cached), output: short(output) }));
    tiles.errors.update(percent(data.error_share, 1), t("now.window", { span: coarse(data.window_seconds) }));
    tiles.first.update(span(data.first_token_seconds.p50), t("now.first.more", { span: span(data.first_token_seconds.p95) }));
    tiles.cached.update(percent(data.cached_share), t("now.cached.more"));
    tiles.lag.update(span(data.loop_lag_seconds.p50), t("now.lag.more", { span: span(data.loop_lag_seconds.max) }));
    tiles.up.update(coarse(data.uptime_seconds), t("now.version", { version: data.version }));
    for (const [status, { bar, count, row }] of parts) {
      bar.style.flexGrow = accounts[status];
      show(bar, accounts[status] > 0);
      say(count, number(accounts[status]));
      row.classList.toggle("none", accounts[status] === 0);
    }
    onSeries(data.series);
  }

  function onSeries(series) {
    if (!series?.points?.length) return;
    step = series.step_seconds;
    const last = points.at(-1)?.[0] ?? -Infinity;
    // A new connection tells the whole series again.
    const isWhole = series.points[0][0] < last;
    points = (isWhole ? [] : points).concat(series.points).slice(-KEPT_POINTS);
    charts.requests.update(points.map(([at, requests, errors]) => [at, requests / step, errors / step]));
    charts.tokens.update(points.map(([at, , , input, cached, output]) => [at, input / step, cached / step, output / step]));
    charts.first.update(points.map((point) => [point[0], point[6]]));
    charts.lag.update(points.map((point) => [point[0], point[7]]));
  }

  return {
    element,
    topic: "now",
    onEvent: (name, data) => name === "now" && onNow(data),
    onReconnect: askRecent,
    stop: () => Object.values(charts).forEach((one) => one.stop()),
  };
}

function sum(a, b) {
  return a === null || b === null ? null : a + b;
}

/** Say in one sentence whether all is well. */
function tell(element, { accounts, alerts, queued }) {
  let kind = "good";
  let text = t("health.good", { active: accounts.active, total: accounts.total });
  if (accounts.total === 0) [kind, text] = ["bad", t("health.none")];
  else if (accounts.active === 0) [kind, text] = ["bad", t("health.nobody", { total: accounts.total })];
  else if (alerts.length > 0) [kind, text] = ["warm", t("health.alerts", { count: alerts.length, active: accounts.active, total: accounts.total })];
  else if (queued > 0) [kind, text] = ["warm", t("health.queued", { count: queued, active: accounts.active, total: accounts.total })];
  else if (accounts.needs_login > 0) [kind, text] = ["warm", t("health.login", { count: accounts.needs_login, active: accounts.active, total: accounts.total })];
  if (element.dataset.text === text) return;
  element.dataset.text = text;
  element.className = `verdict verdict-${kind}`;
  put(element, icon({ good: "ok", warm: "warn", bad: "bad" }[kind], 18), h("span", {}, text));
}
