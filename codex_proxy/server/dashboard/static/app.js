// The frame: who may look, which screen is shown, what holds on all of them (alerts, connection, theme, language).

import { ApiError, onSessionEnd, session, signOut } from "./api.js";
import { h, mark, put, raw, say, show } from "./dom.js";
import { icon, stateMark } from "./icons.js";
import { Live } from "./live.js";
import { alertName } from "./parts.js";
import { LANGUAGES, coarse, currentLanguage, moment, number, remember, remembered, setLanguage, t } from "./text.js";
import { loginScreen } from "./screens/login.js";
import { accountsScreen } from "./screens/accounts.js";
import { cacheScreen } from "./screens/cache.js";
import { connectScreen, gatewayScreen, ownScreen } from "./screens/gateway.js";
import { horizonScreen } from "./screens/horizon.js";
import { nowScreen } from "./screens/now.js";
import { requestsScreen } from "./screens/requests.js";
import { setupScreen } from "./screens/setup.js";
import { startScreen } from "./screens/start.js";

const SCREENS = {
  now: nowScreen,
  accounts: accountsScreen,
  horizon: horizonScreen,
  requests: requestsScreen,
  cache: cacheScreen,
  gateway: gatewayScreen,
  setup: setupScreen,
  start: startScreen,
};
const MENU = ["now", "accounts", "horizon", "requests", "cache", "gateway", "setup"];

/** What the holder of a client key sees instead. */
const HOLDERS_SCREENS = { own: ownScreen, connect: connectScreen };
const HOLDERS_MENU = ["own", "connect"];

const isHolder = () => who?.role === "holder";
const screens = () => (isHolder() ? HOLDERS_SCREENS : SCREENS);
const menu = () => (isHolder() ? HOLDERS_MENU : MENU);
const THEMES = ["auto", "light", "dark"];
const THEME_ICONS = { auto: "screen", light: "sun", dark: "moon" };

const root = document.getElementById("app");
const announcer = h("div", { class: "visually-hidden", role: "status" });
const toasts = h("div", { class: "toasts" });
document.body.append(toasts, announcer);

let who = null;
let shell = null;
let screen = null;
let shown = null;
let skew = 0;
let accounts = null;
let alerts = [];
let greeted = false;
let isLeaving = false;
// Whether something may have happened that nobody told us of.
let hasMissed = false;
let connection = { name: "paused", retryAt: null, heardAt: null };

const live = new Live(onConnection, () => onEnded());
onSessionEnd(() => onEnded());

/** What a screen is given. */
const context = {
  get session() {
    return who;
  },
  get accounts() {
    return accounts;
  },
  /** The daemon's clock. */
  now: () => Date.now() / 1000 + skew,
  setQuery,
  toast,
  announce: (text) => say(announcer, text),
  title: (text) => {
    document.title = `${text} · codex-proxy`;
  },
};

function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const [name, ...rest] = path.split("/");
  return {
    name: name in screens() ? name : menu()[0],
    id: rest.length > 0 && rest[0] !== "" ? decoded(rest.join("/")) : null,
    query: new URLSearchParams(query ?? ""),
  };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    // Typed by hand, perhaps.
    return text;
  }
}

/** Change the filters in the address, without a new screen; empty values leave it. */
function setQuery(changes) {
  const { query } = route();
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "" || value === false) query.delete(name);
    else query.set(name, value);
  }
  const path = location.hash.split("?", 1)[0] || `#/${menu()[0]}`;
  const text = query.toString();
  history.replaceState(null, "", text === "" ? path : `${path}?${text}`);
  return query;
}

function toast(text, kind = "ok") {
  const note = h(
    "div",
    { class: `toast toast-${kind}`, role: kind === "bad" ? "alert" : "status" },
    icon(kind === "bad" ? "warn" : "ok"),
    h("span", {}, text),
    h("button", { class: "quiet", type: "button", "aria-label": t("close"), on: { click: () => note.remove() } }, icon("bad", 14)),
  );
  toasts.append(note);
  // An error stays until it is read.
  if (kind !== "bad") setTimeout(() => note.remove(), 6000);
}

// The frame

function makeShell() {
  const main = h("main", { id: "main", tabindex: "-1" });
  const links = new Map(
    menu().map((name) => [name, h("a", { href: `#/${name}` }, icon(name, 18), h("span", {}, t(`nav.${name}`)))]),
  );
  const pool = h("div", { class: "pool", "aria-label": t("pool"), role: "group" });
  const alarm = h("a", { class: "alarm", href: "#/now", hidden: true });
  const theme = remembered("theme") ?? "auto";
  const bar = h(
    "header",
    { class: "bar" },
    h("a", { class: "brand", href: `#/${menu()[0]}` }, raw("span", {}, "codex-proxy")),
    h("nav", { "aria-label": t("nav") }, ...links.values()),
    h(
      "div",
      { class: "tools" },
      pool,
      alarm,
      h(
        "button",
        { class: "quiet", type: "button", id: "theme", "aria-label": `${t("theme")}: ${t(`theme.${theme}`)}`, title: `${t("theme")}: ${t(`theme.${theme}`)}`, on: { click: nextTheme } },
        icon(THEME_ICONS[theme] ?? "screen", 18),
      ),
      h(
        "select",
        { id: "language", "aria-label": t("language"), on: { change: (event) => changeLanguage(event.target.value) } },
        ...LANGUAGES.map(([code, name]) =>
          h("option", { value: code, lang: code, translate: "no", selected: code === currentLanguage() }, name),
        ),
      ),
      who.needs_key &&
        h("button", { class: "quiet", type: "button", id: "leave", "aria-label": t("sign_out"), title: t("sign_out"), on: { click: leave } }, icon("leave", 18)),
    ),
  );
  const lost = h("div", { class: "banner banner-lost", hidden: true });
  const lostText = h("span", {});
  const lostTime = h("span", { class: "muted", "aria-live": "off" });
  lost.append(
    icon("warn"),
    h("span", { class: "grow" }, lostText, " ", lostTime),
    h("button", { type: "button", on: { click: () => live.retry() } }, t("lost.retry")),
  );
  const banner = h("div", { class: "banners", role: "region", "aria-label": t("notices") }, lost);
  const alarms = h("div", { class: "alarms" });
  banner.append(alarms);
  put(
    root,
    h("a", { class: "skip", href: "#main", on: { click: skip } }, t("skip")),
    bar,
    banner,
    main,
  );
  return { main, links, pool, alarm, banner, lost, lostText, lostTime, alarms };
}

function skip(event) {
  event.preventDefault();
  shell.main.focus();
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(remembered("theme") ?? "auto") + 1) % THEMES.length];
  remember("theme", theme === "auto" ? null : theme);
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  rebuild("theme");
  context.announce(`${t("theme")}: ${t(`theme.${theme}`)}`);
}

function changeLanguage(code) {
  setLanguage(code);
  rebuild("language");
}

/** Draw everything again, for another language or other colours; the focus stays where it was. */
function rebuild(focus) {
  if (shell === null) return showLogin();
  closeScreen();
  shell = makeShell();
  showScreen();
  drawPool();
  drawAlerts();
  drawConnection();
  document.getElementById(focus)?.focus();
}

async function leave() {
  live.watch(null, () => {});
  try {
    await signOut();
  } catch {
    // It is over here in any case.
  }
  await begin();
}

// Screens

function closeScreen() {
  screen?.stop?.();
  screen = null;
}

function showScreen() {
  closeScreen();
  const asked = route();
  shown = asked;
  for (const [name, link] of shell.links) mark(link, "aria-current", name === asked.name ? "page" : null);
  context.title(t(asked.name === "start" ? "start.title" : `nav.${asked.name}`));
  document.body.dataset.screen = asked.name;
  screen = screens()[asked.name]({ ...bound(), route: asked });
  hasMissed = false;
  put(shell.main, screen.element);
  live.watch(screen.topic ?? null, onEvent);
}

// Getters do not survive a spread.
function bound() {
  return Object.defineProperties({}, Object.getOwnPropertyDescriptors(context));
}

function onRoute() {
  if (shell === null) return;
  const asked = route();
  const isSame = shown !== null && asked.name === shown.name && asked.id === shown.id;
  shown = asked;
  if (isSame && screen.onQuery !== undefined) {
    screen.onQuery(asked.query);
    return;
  }
  showScreen();
  scrollTo(0, 0);
  // Whoever reads by ear is told where they are; a heading is what a screen begins with.
  const heading = shell.main.querySelector("h1");
  heading?.setAttribute("tabindex", "-1");
  heading?.focus({ preventScroll: true });
}

function onEvent(name, data) {
  if (typeof data.at === "number") skew = data.at - Date.now() / 1000;
  if (name === "now") {
    accounts = data.accounts;
    setAlerts(data.alerts ?? []);
    drawPool();
    if (accounts.total === 0 && !greeted && shown.name === "now") {
      greeted = true;
      location.replace("#/start");
      return;
    }
  }
  screen?.onEvent?.(name, data);
}

// The connection

function onConnection(state) {
  connection = state;
  if (state.name === "lost" || state.name === "paused") hasMissed = true;
  if (shell === null) return;
  drawConnection();
  if (state.name === "open" && hasMissed) {
    hasMissed = false;
    screen?.onReconnect?.();
  }
}

function drawConnection() {
  const isLost = connection.name === "lost";
  show(shell.lost, isLost);
  document.body.classList.toggle("is-stale", isLost);
  if (isLost) {
    say(shell.lostText, t("lost"));
    tickConnection();
  }
}

function tickConnection() {
  const now = Date.now() / 1000;
  const parts = [];
  if (connection.heardAt !== null) {
    parts.push(t("lost.age", { time: moment(connection.heardAt, now), span: coarse(now - connection.heardAt) }));
  }
  if (connection.retryAt !== null) parts.push(t("lost.again", { span: coarse(Math.max(0, connection.retryAt - now)) }));
  say(shell.lostTime, parts.join(" "));
}

// Alerts and the pool

function setAlerts(found) {
  const key = JSON.stringify(found);
  if (key === JSON.stringify(alerts)) return;
  alerts = found;
  if (shell !== null) drawAlerts();
}

function drawAlerts() {
  show(shell.alarm, alerts.length > 0);
  put(shell.alarm, icon("bell"), h("span", { "aria-hidden": "true" }, number(alerts.length)), h("span", { class: "visually-hidden" }, t("alerts.count", { count: alerts.length })));
  put(
    shell.alarms,
    alerts.map((one) =>
      h(
        "div",
        { class: "banner banner-alert", role: "status" },
        icon("warn"),
        h("span", { class: "grow" }, alertName(one.name), " ", raw("span", {}, one.text)),
        h("span", { class: "muted" }, t("since", { time: moment(one.since, context.now()) })),
      ),
    ),
  );
}

function drawPool() {
  // Who logs in after an owner sees nothing of what that one saw.
  if (accounts === null || isHolder()) return;
  show(shell.pool, accounts.total > 0);
  const parts = ["active", "cooldown", "unavailable", "needs_login", "disabled"].filter(
    (status) => status === "active" || accounts[status] > 0,
  );
  const key = parts.map((status) => `${status}${accounts[status]}`).join();
  if (shell.pool.dataset.key === key) return;
  shell.pool.dataset.key = key;
  put(
    shell.pool,
    parts.map((status) =>
      h(
        "a",
        { href: `#/accounts?status=${status}`, title: `${t(`state.${status}`)}: ${accounts[status]}` },
        stateMark(status),
        h("span", {}, String(accounts[status])),
        h("span", { class: "visually-hidden" }, ` ${t(`state.${status}`)}`),
      ),
    ),
  );
}

// Once a second what counts down does; nothing while nobody looks.
setInterval(() => {
  if (shell === null || document.hidden) return;
  if (connection.name === "lost") tickConnection();
  screen?.tick?.(context.now());
}, 1000);

// The session

function onEnded() {
  // Several answers may say so at a time.
  if (shell === null || isLeaving) return;
  isLeaving = true;
  live.watch(null, () => {});
  begin(t("login.ended"));
}

function showLogin(notice = "") {
  closeScreen();
  shell = null;
  document.body.classList.remove("is-stale");
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  context.title(t("login.title"));
  put(
    root,
    loginScreen({ notice, language: { change: changeLanguage }, done: (found) => enter(found) }),
  );
  root.querySelector("input")?.focus();
}

function enter(found) {
  who = found;
  accounts = null;
  alerts = [];
  shell = makeShell();
  showScreen();
  drawAlerts();
}

/** Find out who we are, and show what that allows. */
async function begin(notice = "") {
  setLanguage(currentLanguage());
  try {
    const found = await session();
    isLeaving = false;
    who = found;
    if (found.authenticated) enter(found);
    else showLogin(notice);
  } catch (error) {
    isLeaving = false;
    closeScreen();
    shell = null;
    const text = error instanceof ApiError && error.message !== "" ? error.message : t("lost");
    put(
      root,
      h(
        "main",
        { class: "center" },
        h("h1", {}, t("lost.title")),
        h("p", {}, text),
        h("button", { type: "button", class: "primary", on: { click: () => begin() } }, t("lost.retry")),
      ),
    );
  }
}

addEventListener("hashchange", onRoute);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (shell !== null && remembered("theme") === null) rebuild();
});
begin();
