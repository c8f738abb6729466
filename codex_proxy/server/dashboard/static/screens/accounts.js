// Every account: how full its windows are, what holds it, and what can be done about it.

import { post, stream } from "../api.js";
import { openImport, openLogin, openRound } from "../adding.js";
import { debounced, h, keyed, mark, put, raw, say, show } from "../dom.js";
import { icon, stateMark } from "../icons.js";
import { choice, confirm, failureText, heading, meter, scrollBox, stateChip } from "../parts.js";
import { coarse, collate, full, moment, number, percent, seconds, t, term, windowName } from "../text.js";

const STATUSES = ["active", "cooldown", "unavailable", "needs_login", "disabled"];
const DAY_MINUTES = 24 * 60;

// How long old numbers may be before they say so.
const OLD_SECONDS = 3600;

const COLUMNS = [
  ["alias", (a) => a.alias],
  ["state", (a) => STATUSES.indexOf(a.status)],
  ["short", (a) => windowOf(a, false)?.used_percent ?? -1],
  ["long", (a) => windowOf(a, true)?.used_percent ?? -1],
  ["age", (a) => newest(a) ?? -1],
  ["in_flight", (a) => a.in_flight],
  ["requests", (a) => a.total_requests],
  ["cached", (a) => a.cached_share ?? -1],
];

export function accountsScreen(context) {
  const query = context.route.query;
  const view = {
    q: query.get("q") ?? "",
    status: query.get("status") ?? "",
    sort: COLUMNS.some(([name]) => name === query.get("sort")) ? query.get("sort") : "alias",
    dir: query.get("dir") === "desc" ? "desc" : "asc",
  };
  const accounts = new Map();
  let isKnown = false;

  const head = heading(
    t("nav.accounts"),
    button("device.title", () => openLogin((alias) => context.toast(t("device.added", { alias: alias ?? "" }))), "primary", "plus"),
    button("import.title", () => openImport(() => {})),
    button("round.check", () => openRound(t("round.check"), (onEvent, signal) => stream("/check-quota", {}, onEvent, signal))),
    button("round.refresh", refreshAll),
  );
  const search = h("input", { type: "search", id: "account-search", autocomplete: "off", spellcheck: "false", value: view.q, placeholder: t("accounts.search"), "aria-label": t("accounts.search") });
  search.addEventListener("input", debounced(() => change({ q: search.value }), 120));
  const filters = new Map();
  const chips = h("div", { class: "segments wrap", role: "group", "aria-label": t("accounts.filter") });
  for (const status of ["", ...STATUSES]) {
    const count = h("b", {});
    const one = h("button", { type: "button", on: { click: () => change({ status }) } }, status !== "" && stateMark(status), h("span", {}, status === "" ? t("all") : t(`state.${status}`)), " ", count);
    filters.set(status, { one, count });
    chips.append(one);
  }
  // Cards have no headers to click.
  const sorting = choice("sort", t("sort"), COLUMNS.map(([name]) => [name, t(`accounts.${name}`)]), view.sort, (sort) => change({ sort }));
  sorting.element.classList.add("cards-only");

  const headers = new Map();
  const headRow = h("tr", { role: "row" });
  for (const [name] of COLUMNS) {
    const cell = h("th", { scope: "col", role: "columnheader", class: `c-${name}` }, h("button", { type: "button", on: { click: () => sortBy(name) } }, t(`accounts.${name}`), h("span", { class: "arrow", "aria-hidden": "true" })));
    headers.set(name, cell);
    headRow.append(cell);
  }
  const body = h("tbody", { role: "rowgroup" });
  const empty = h("p", { class: "empty", hidden: true });
  const table = h("table", { class: "grid accounts", role: "table", "aria-label": t("nav.accounts") }, h("thead", { role: "rowgroup" }, headRow), body);
  const problems = h("section", { class: "panel problems", hidden: true, "aria-labelledby": "problems" });
  const element = h(
    "div",
    {},
    head.element,
    h("div", { class: "filters" }, h("label", { class: "field search" }, search), chips, sorting.element),
    scrollBox(t("nav.accounts"), table),
    empty,
    problems,
  );
  // Countdowns of rows that nobody sees need not run.
  const rowOf = new WeakMap();
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const row = rowOf.get(entry.target);
        row.isSeen = entry.isIntersecting;
        if (row.isSeen) row.tick(context.now());
      }
    },
    { rootMargin: "200px" },
  );
  const rows = keyed(body, (account) => {
    const row = accountRow(account, { act, now: context.now });
    rowOf.set(row.nodes[0], row);
    observer.observe(row.nodes[0]);
    return row;
  });

  function button(key, action, kind = null, picture = null) {
    return h("button", { type: "button", class: kind, on: { click: action } }, picture && icon(picture), h("span", {}, t(key)));
  }

  async function refreshAll() {
    const isMeant = await confirm({ title: t("round.refresh"), text: t("round.refresh.sure"), verb: t("round.refresh") });
    if (isMeant) openRound(t("round.refresh"), (onEvent, signal) => stream("/refresh", {}, onEvent, signal));
  }

  function sortBy(name) {
    const isSame = view.sort === name;
    // Of numbers the largest is what one looks for first.
    const dir = isSame ? (view.dir === "asc" ? "desc" : "asc") : name === "alias" || name === "state" ? "asc" : "desc";
    change({ sort: name, dir });
  }

  function change(changes) {
    Object.assign(view, changes);
    context.setQuery({ ...view, sort: view.sort === "alias" ? "" : view.sort, dir: view.dir === "asc" ? "" : view.dir });
    draw();
  }

  function draw() {
    const needle = view.q.trim().toLowerCase();
    const counts = new Map(STATUSES.map((status) => [status, 0]));
    const found = [];
    for (const account of accounts.values()) {
      const text = `${account.alias} ${account.email ?? ""} ${account.file_path ?? ""} ${account.plan_type ?? ""} ${account.reason ?? ""}`;
      if (needle !== "" && !text.toLowerCase().includes(needle)) continue;
      counts.set(account.status, (counts.get(account.status) ?? 0) + 1);
      if (view.status === "" || account.status === view.status) found.push(account);
    }
    const valueOf = COLUMNS.find(([name]) => name === view.sort)[1];
    const sign = view.dir === "desc" ? -1 : 1;
    found.sort((a, b) => {
      const [x, y] = [valueOf(a), valueOf(b)];
      const order = typeof x === "string" ? collate(x, y) : x - y;
      return order !== 0 ? sign * order : collate(a.alias, b.alias);
    });
    rows.show(found, (account) => account.alias);
    let all = 0;
    for (const [status, { one, count }] of filters) {
      all += counts.get(status) ?? 0;
      mark(one, "aria-pressed", view.status === status ? "true" : "false");
      if (status !== "") say(count, number(counts.get(status)));
    }
    say(filters.get("").count, number(all));
    for (const [name, cell] of headers) {
      mark(cell, "aria-sort", view.sort === name ? (view.dir === "asc" ? "ascending" : "descending") : null);
    }
    if (sorting.select.value !== view.sort) sorting.select.value = view.sort;
    say(head.news, isKnown ? t("accounts.shown", { shown: number(found.length), total: number(accounts.size) }) : t("loading"));
    show(empty, isKnown && found.length === 0);
    if (isKnown && found.length === 0) {
      put(empty, accounts.size === 0 ? [t("accounts.none"), " ", h("a", { href: "#/start" }, t("start.title"))] : t("accounts.nothing"));
    }
  }

  async function act(account, action) {
    const isDangerous = action === "remove" || action === "logout";
    const isMeant = await confirm({
      title: t(`action.${action}.title`, { alias: account.alias }),
      text: t(`action.${action}.text`),
      verb: t(`action.${action}`),
      isDangerous,
    });
    if (!isMeant) return;
    try {
      const done = await post(`/accounts/${encodeURIComponent(account.alias)}/${action}`);
      context.toast(`${done.alias}: ${done.message}`, done.success ? "ok" : "bad");
      if (done.account !== null) accounts.set(done.account.alias, { ...account, ...done.account, seen: context.now() });
      else if (done.success) accounts.delete(account.alias);
      draw();
    } catch (failure) {
      context.toast(`${account.alias}: ${failureText(failure)}`, "bad");
    }
  }

  function onAccounts(data) {
    if (data.all) accounts.clear();
    const now = context.now();
    for (const account of data.accounts) accounts.set(account.alias, { ...account, seen: now });
    for (const alias of data.gone ?? []) accounts.delete(alias);
    isKnown = true;
    draw();
    if (data.problems !== undefined) drawProblems(data.problems);
  }

  function drawProblems(found) {
    show(problems, found.length > 0);
    put(
      problems,
      h("h2", { id: "problems" }, t("accounts.problems")),
      h("ul", { class: "results" }, found.map((one) => h("li", { class: "bad" }, icon("warn", 14), raw("strong", {}, one.file), " ", raw("span", {}, one.reason)))),
    );
  }

  draw();
  return {
    element,
    topic: "accounts",
    onEvent: (name, data) => name === "accounts" && onAccounts(data),
    onQuery(found) {
      Object.assign(view, { q: found.get("q") ?? "", status: found.get("status") ?? "" });
      search.value = view.q;
      draw();
    },
    tick(now) {
      for (const row of rows.rows.values()) if (row.isSeen) row.tick(now);
    },
    stop: () => observer.disconnect(),
  };
}

function accountRow(first, { act, now }) {
  let account = first;
  let isDrawn = false;
  let details = null;
  const open = h(
    "button",
    { type: "button", class: "expand", "aria-expanded": "false", on: { click: toggle } },
    icon("chevron", 14),
    raw("span", { class: "alias" }, first.alias),
  );
  const under = raw("span", { class: "under" });
  const state = h("div", {});
  const reason = reasonLine();
  const short = windowCell(t("accounts.short"));
  const long = windowCell(t("accounts.long"));
  const age = h("span", {});
  const inFlight = h("span", {});
  const requests = h("span", {});
  const errors = h("span", { class: "under" });
  const cached = h("span", {});
  const cell = (name, ...children) => h("td", { role: "cell", class: `c-${name}`, "data-label": t(`accounts.${name}`) }, ...children);
  const row = h(
    "tr",
    { role: "row", class: "account" },
    h("th", { scope: "row", role: "rowheader", class: "c-alias" }, open, under),
    cell("state", state, reason.element),
    cell("short", short.element),
    cell("long", long.element),
    cell("age", age),
    cell("in_flight", inFlight),
    cell("requests", requests, " ", errors),
    cell("cached", cached),
  );
  const more = h("td", { colspan: COLUMNS.length, role: "cell" });
  const moreRow = h("tr", { role: "row", class: "more", hidden: true }, more);

  function toggle() {
    const isOpen = moreRow.hidden;
    show(moreRow, isOpen);
    mark(open, "aria-expanded", isOpen ? "true" : "false");
    row.classList.toggle("is-open", isOpen);
    details = isOpen ? accountDetails(act, now) : null;
    put(more, details?.element);
    details?.update(account);
  }

  function update(found) {
    if (found === account && isDrawn) return;
    account = found;
    isDrawn = true;
    say(under, [found.plan_type, found.email].filter(Boolean).join(" · "));
    if (state.dataset.status !== found.status) {
      state.dataset.status = found.status;
      put(state, stateChip(found.status));
      row.dataset.status = found.status;
    }
    say(inFlight, number(found.in_flight));
    say(requests, number(found.total_requests));
    say(errors, found.total_errors > 0 ? t("accounts.errors", { count: found.total_errors }) : "");
    say(cached, percent(found.cached_share));
    details?.update(found);
    tick(now());
  }

  function tick(at) {
    short.update(windowOf(account, false), at, account.seen);
    long.update(windowOf(account, true), at, account.seen);
    const known = newest(account);
    const seconds = known === null ? null : known + (at - account.seen);
    say(age, seconds === null ? t("unknown") : coarse(seconds));
    age.classList.toggle("old", seconds === null || seconds > OLD_SECONDS);
    reason.update(account, at);
    details?.tick(at);
  }

  return { nodes: [row, moreRow], isSeen: true, update, tick };
}

/** Which rule keeps an account from serving, and for how long; the daemon's own words where we have none. */
function reasonLine() {
  const ours = h("span", {});
  const theirs = raw("span", {});
  const rest = h("span", {});
  const element = h("div", { class: "under" }, ours, theirs, rest);
  return {
    element,
    update(account, at) {
      const isActive = account.status === "active";
      // A login that is lost comes back with a person, not with time.
      const until = account.status === "needs_login" ? null : (account.state?.until ?? seconds(account.cooldown_until));
      const rule = account.state?.rule ?? null;
      const words = isActive || account.reason ? null : rule && term("rule", rule);
      say(ours, words ?? "");
      say(theirs, isActive || words ? "" : (account.reason ?? rule ?? ""));
      say(rest, isActive || until === null || until <= at ? "" : ` · ${t("for", { span: coarse(until - at) })}`);
      show(element, !isActive);
      mark(element, "title", account.state?.evidence ?? account.reason ?? null);
    },
  };
}

function windowCell(label) {
  const bar = meter(label);
  const reset = h("span", { class: "under" });
  return {
    element: h("div", { class: "window" }, bar.element, reset),
    update(found, at, seen) {
      if (found === null) {
        bar.update(null);
        say(reset, "");
        return;
      }
      const end = seconds(found.resets_at);
      const isOver = end !== null && end <= at;
      // What has started again since is unknown, not full.
      bar.update(isOver ? null : found.used_percent);
      say(reset, end === null ? "" : isOver ? t("window.over") : t("window.resets", { span: coarse(end - at) }));
      mark(reset, "title", end === null ? null : full(end));
    },
  };
}

/** An account's own window of hours, or of days. */
function windowOf(account, isLong) {
  const own = (account.quota?.windows ?? []).filter((one) => one.limit === "codex" && one.minutes !== null);
  return own.find((one) => one.minutes >= DAY_MINUTES === isLong) ?? null;
}

/** The age of the newest number, in seconds; null when nothing is known. */
function newest(account) {
  const ages = (account.quota?.windows ?? []).map((one) => one.age).filter((age) => age !== null);
  return ages.length > 0 ? Math.min(...ages) : null;
}

const ACTIONS = ["check", "refresh", "reset", "disable", "enable", "logout", "remove"];

function accountDetails(act, now) {
  const facts = h("dl", { class: "facts" });
  const windows = h("div", { class: "windows" });
  const buttons = new Map();
  const bar = h("div", { class: "actions" });
  let account = null;
  for (const action of ACTIONS) {
    const one = h("button", { type: "button", class: action === "remove" || action === "logout" ? "danger-quiet" : null, "data-action": action, on: { click: () => act(account, action) } }, t(`action.${action}`));
    buttons.set(action, one);
    bar.append(one);
  }
  const element = h("div", { class: "details" }, facts, windows, bar);
  let key = "";

  function update(found) {
    account = found;
    show(buttons.get("disable"), found.status !== "disabled");
    show(buttons.get("enable"), found.status === "disabled");
    tick(now());
  }

  function tick(at) {
    const state = account.state ?? {};
    const rows = [
      ["details.rule", state.rule && (term("rule", state.rule) ?? term("state", state.rule) ?? state.rule)],
      ["details.evidence", state.evidence ?? account.reason, true],
      ["details.since", state.since && `${moment(state.since, at)} (${t("ago", { span: coarse(at - state.since) })})`],
      ["details.until", state.until && `${moment(state.until, at)} (${t("in", { span: coarse(state.until - at) })})`],
      ["details.login", t(`login.${account.login}`)],
      ["details.login_reason", account.login_reason, true],
      ["details.last_error", account.last_error, true],
      ["details.token", seconds(account.token_expire) && t("details.token.ends", { time: moment(seconds(account.token_expire), at), span: coarse(seconds(account.token_expire) - at) })],
      ["details.used", seconds(account.last_used_at) && t("ago", { span: coarse(at - seconds(account.last_used_at)) })],
      ["details.tokens", t("details.tokens.text", { input: number(account.usage.input_tokens), cached: number(account.usage.cached_tokens), output: number(account.usage.output_tokens) })],
      ["details.file", account.file_path, true],
      ["details.scheduling", t("details.scheduling.text", { priority: number(account.priority), weight: number(account.weight, 2), limit: account.max_concurrency === null ? t("unlimited") : number(account.max_concurrency) })],
      ["details.models", [...account.models_allowed, ...account.models_denied.map((name) => `−${name}`)].join(", "), true],
      ["details.credits", credits(account.quota?.credits)],
      ["details.spend", spend(account.quota?.spend)],
    ].filter(([, text]) => text);
    const shown = JSON.stringify(rows);
    if (shown === key) return;
    key = shown;
    put(facts, rows.map(([name, text, isRaw]) => h("div", {}, h("dt", {}, t(name)), isRaw ? raw("dd", {}, text) : h("dd", {}, text))));
    put(
      windows,
      (account.quota?.windows ?? []).map((one) => {
        const bar = meter(`${one.limit_name ?? one.limit} ${windowName(one.window)}`);
        bar.update(one.used_percent);
        const end = seconds(one.resets_at);
        return h(
          "div",
          { class: "window-line" },
          h("span", {}, raw("span", {}, one.limit_name ?? one.limit), " ", windowName(one.window)),
          bar.element,
          h("span", { class: "under" }, end === null ? t("unknown") : t("window.resets.at", { time: moment(end, at) })),
          h("span", { class: "under" }, one.age === null ? "" : t("window.age", { span: coarse(one.age), source: one.source ?? "" })),
        );
      }),
    );
  }

  return { element, update, tick };
}

function credits(found) {
  if (!found || found.has_credits === null) return null;
  if (found.unlimited) return t("unlimited");
  return found.has_credits ? (found.balance ?? t("yes")) : t("no");
}

function spend(found) {
  if (!found || (found.limit === null && found.used === null)) return null;
  return t("details.spend.text", { used: found.used ?? t("unknown.sign"), limit: found.limit ?? t("unknown.sign") });
}
