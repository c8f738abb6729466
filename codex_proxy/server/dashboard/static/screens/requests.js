// What was asked: the last ones as they end, filters that live in the address, and each one's story.

import { get } from "../api.js";
import { debounced, h, keyed, mark, put, raw, say, show } from "../dom.js";
import { icon } from "../icons.js";
import { choice, copyButton, heading, outcomeChip, scrollBox, snippet, tokensText, trouble } from "../parts.js";
import { bytes, clock, full, number, percent, span, t, term, weekday } from "../text.js";

const FILTERS = ["q", "caller", "account", "model", "outcome", "route", "client", "min_seconds", "last", "since", "until"];
const OUTCOMES = ["completed", "incomplete", "failed", "caller_gone"];
const PAGE = 100;

// More rows than that nobody reads, and who only watches needs fewer; the filters find the rest.
const MOST_ROWS = 1000;
const MOST_LIVE = 200;

// While many come in, they are drawn so often.
const DRAW_MS = 1000;

const CALM_MS = 1500;

export function requestsScreen(context) {
  return context.route.id === null ? listScreen(context) : detailScreen(context);
}

function listScreen(context) {
  const view = read(context.route.query);
  let found = [];
  let waiting = [];
  let next = null;
  let oldest = null;
  let isLive = true;
  let isLoading = false;
  let asked = null;
  let missed = 0;
  let edge = null;
  let hasPaged = false;
  let drawnAt = 0;
  let timer = 0;
  let heardAt = 0;
  const seen = { route: new Set(), client: new Set() };
  const known = { callers: [], accounts: [], models: [] };

  const pause = h("button", { type: "button", on: { click: () => setLive(!isLive) } });
  const head = heading(t("nav.requests"), pause);
  const error = trouble();
  const search = h("input", { type: "search", name: "q", autocomplete: "off", spellcheck: "false", value: view.q, placeholder: t("requests.search"), "aria-label": t("requests.search") });
  search.addEventListener("input", debounced(() => change({ q: search.value.trim() }), 250));
  const selects = {
    last: filter("last", [["", t("requests.ever")], ["900", t("requests.last", { span: span(900) })], ["3600", t("requests.last", { span: span(3600) })], ["86400", t("requests.last", { span: span(86400) })]]),
    outcome: filter("outcome", [["", t("all")], ...OUTCOMES.map((one) => [one, t(`outcome.${one}`)])]),
    account: filter("account", []),
    caller: filter("caller", []),
    model: filter("model", []),
    route: filter("route", []),
    client: filter("client", []),
    min_seconds: filter("min_seconds", [["", t("requests.any")], ...[1, 5, 15, 60].map((one) => [String(one), t("requests.longer", { span: span(one) })])]),
  };
  // On a narrow screen they would push the rows away.
  const open = h("button", { type: "button", class: "cards-only", "aria-expanded": "false", on: { click: () => openFilters() } }, t("requests.filters"));
  const clear = h("button", { type: "button", hidden: true, on: { click: () => change(Object.fromEntries(FILTERS.map((name) => [name, ""]))) } }, icon("bad", 14), h("span", {}, t("requests.clear")));
  const fresh = h("button", { type: "button", class: "fresh", hidden: true, on: { click: () => release(true) } });
  const body = h("tbody", { role: "rowgroup" });
  const COLUMNS = ["at", "outcome", "model", "route", "caller", "account", "first", "seconds", "tokens", "error"];
  const table = h(
    "table",
    { class: "grid requests", role: "table", "aria-label": t("nav.requests") },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, COLUMNS.map((name) => h("th", { scope: "col", role: "columnheader", class: `c-${name}` }, t(`requests.${name}`))))),
    body,
  );
  const rows = keyed(body, (request) => requestRow(request, hrefOf));
  const more = h("button", { type: "button", hidden: true, on: { click: loadMore } }, t("requests.more"));
  const end = h("p", { class: "empty" });
  const element = h(
    "div",
    {},
    head.element,
    h("div", { class: "filters" }, h("label", { class: "field search" }, search), open, Object.values(selects).map((one) => one.element), clear),
    error.element,
    h("div", { class: "fresh-row" }, fresh),
    scrollBox(t("nav.requests"), table),
    h("div", { class: "row" }, more),
    end,
  );

  function filter(name, options) {
    const one = choice(name, t(name === "last" ? "requests.last.title" : `requests.${name}`), options, view[name], (value) => change({ [name]: value }));
    one.element.classList.add("more-filter");
    return one;
  }

  function openFilters() {
    const isOpen = open.parentElement.classList.toggle("is-open");
    mark(open, "aria-expanded", isOpen ? "true" : "false");
  }

  function hrefOf(request) {
    const text = new URLSearchParams(Object.entries(view).filter(([, value]) => value !== "")).toString();
    return `#/requests/${encodeURIComponent(request.id)}${text === "" ? "" : `?${text}`}`;
  }

  function change(changes) {
    Object.assign(view, changes);
    context.setQuery(changes);
    drawFilters();
    load();
  }

  function drawFilters() {
    const list = (values, value) => [["", t("all")], ...[...new Set([...values, ...(value === "" ? [] : [value])])].map((one) => [one, one, true])];
    selects.account.fill(list(known.accounts, view.account), view.account);
    selects.caller.fill(list(known.callers, view.caller), view.caller);
    selects.model.fill(list(known.models, view.model), view.model);
    selects.route.fill(list([...seen.route].sort(), view.route), view.route);
    selects.client.fill(list([...seen.client].sort(), view.client), view.client);
    for (const name of ["last", "outcome", "min_seconds"]) selects[name].select.value = view[name];
    for (const name of Object.keys(selects)) selects[name].element.classList.toggle("is-set", view[name] !== "");
    if (document.activeElement !== search) search.value = view.q;
    show(clear, FILTERS.some((name) => view[name] !== ""));
  }

  /** *before* is a cursor; where rows were let go there is none, and *edge*, the time of the last one, stands for it. */
  function asks(before = null, until = null) {
    const query = new URLSearchParams({ limit: String(PAGE) });
    for (const name of FILTERS) if (view[name] !== "" && name !== "last") query.set(name, view[name]);
    if (view.last !== "") query.set("since", String(Math.floor(context.now() - Number(view.last))));
    if (before !== null) query.set("before", before);
    else if (until !== null) query.set("until", String(until + 0.001));
    return `/requests?${query}`;
  }

  async function load() {
    asked?.abort();
    const control = (asked = new AbortController());
    isLoading = true;
    try {
      const page = await get(asks(), control.signal);
      // What ended while we asked may be in both.
      const ids = new Set(page.requests.map((one) => one.id));
      found = [...waiting.filter((one) => !ids.has(one.id) && matches(one, view, context.now())), ...page.requests];
      waiting = [];
      edge = null;
      hasPaged = false;
      take(page);
      error.tell(null);
    } catch (failure) {
      if (failure.name === "AbortError") return;
      error.tell(failure);
    }
    isLoading = false;
    draw();
  }

  async function loadMore() {
    more.disabled = true;
    try {
      const page = await get(asks(next, edge));
      const ids = new Set(found.map((one) => one.id));
      found = [...found, ...page.requests.filter((one) => !ids.has(one.id))];
      edge = null;
      hasPaged = true;
      take(page);
      error.tell(null);
    } catch (failure) {
      error.tell(failure);
    }
    more.disabled = false;
    draw();
  }

  function take(page) {
    next = page.next;
    oldest = page.since ?? null;
    known.callers = page.callers;
    known.accounts = page.accounts;
    known.models = page.models;
    page.requests.forEach(learn);
    drawFilters();
  }

  function learn(request) {
    for (const name of ["route", "client"]) if (request[name]) seen[name].add(request[name]);
  }

  function setLive(wanted) {
    isLive = wanted;
    missed = 0;
    put(pause, icon(isLive ? "pause" : "play"), h("span", {}, t(isLive ? "requests.pause" : "requests.go")));
    if (isLive) load();
  }

  function onRequests(data) {
    if (!isLive) return;
    heardAt = Date.now();
    data.requests.forEach(learn);
    missed += data.dropped ?? 0;
    const fitting = data.requests.filter((one) => matches(one, view, context.now()));
    if (fitting.length === 0) return;
    waiting = [...fitting, ...waiting].slice(0, MOST_LIVE);
    if (isLoading) return;
    // Whoever reads further down is not pushed away.
    if (scrollY > 240) drawFresh();
    else {
      clearTimeout(timer);
      timer = setTimeout(() => release(false), Math.max(0, drawnAt + DRAW_MS - Date.now()));
    }
  }

  function release(isAsked) {
    const ids = new Set(waiting.map((one) => one.id));
    found = [...waiting, ...found.filter((one) => !ids.has(one.id))];
    const most = hasPaged ? MOST_ROWS : MOST_LIVE;
    if (found.length > most) {
      found.length = most;
      // The cursor belongs to a row that is gone.
      next = null;
      edge = found.at(-1).at;
    }
    waiting = [];
    drawnAt = Date.now();
    draw();
    if (isAsked) scrollTo(0, 0);
  }

  function drawFresh() {
    show(fresh, waiting.length > 0);
    say(fresh, t("requests.fresh", { count: waiting.length }));
  }

  function draw() {
    drawFresh();
    rows.show(found, (one) => one.id);
    show(more, (next !== null || edge !== null) && found.length < MOST_ROWS);
    const parts = [t("requests.shown", { count: found.length })];
    if (missed > 0) parts.push(t("requests.missed", { count: missed }));
    say(head.news, isLoading ? t("loading") : parts.join(" "));
    if (found.length === 0 && !isLoading) {
      say(end, FILTERS.some((name) => view[name] !== "") ? t("requests.nothing") : t("requests.none"));
    } else {
      say(end, next === null && edge === null && oldest !== null && !isLoading ? t("requests.end", { time: full(oldest) }) : "");
    }
  }

  setLive(true);
  drawFilters();
  const onScroll = () => {
    if (scrollY <= 240 && waiting.length > 0 && !isLoading) release(false);
  };
  addEventListener("scroll", onScroll, { passive: true });
  return {
    element,
    topic: "requests",
    onEvent: (name, data) => name === "requests" && onRequests(data),
    /** What went by too fast to be told is asked for when it is calm again. */
    tick() {
      if (missed === 0 || !isLive || hasPaged || scrollY > 240 || Date.now() - heardAt < CALM_MS) return;
      missed = 0;
      load();
    },
    // What ended while nobody listened is asked for.
    onReconnect: load,
    onQuery(query) {
      Object.assign(view, read(query));
      search.value = view.q;
      drawFilters();
      load();
    },
    stop() {
      asked?.abort();
      clearTimeout(timer);
      removeEventListener("scroll", onScroll);
    },
  };
}

function read(query) {
  return Object.fromEntries(FILTERS.map((name) => [name, query.get(name) ?? ""]));
}

/** Whether a request that has just ended passes the filters. */
export function matches(request, view, now) {
  const needle = view.q.toLowerCase();
  return (
    ["caller", "account", "model", "outcome", "route", "client"].every((name) => view[name] === "" || (request[name] ?? "") === view[name]) &&
    (needle === "" || request.id.toLowerCase().includes(needle) || (request.error ?? "").toLowerCase().includes(needle)) &&
    (view.min_seconds === "" || request.seconds >= Number(view.min_seconds)) &&
    (view.last === "" || request.at >= now - Number(view.last)) &&
    (view.since === "" || request.at >= Number(view.since)) &&
    (view.until === "" || request.at <= Number(view.until))
  );
}

function requestRow(request, hrefOf) {
  const cell = (name, ...children) => h("td", { role: "cell", class: `c-${name}`, "data-label": t(`requests.${name}`) }, ...children);
  const link = h("a", { href: hrefOf(request), title: request.id }, clock(request.at));
  const row = h(
    "tr",
    {
      role: "row", "data-id": request.id,
      class: `request${request.outcome === "failed" ? " is-failed" : ""}${request.error ? " has-error" : ""}`,
      on: {
        click: (event) => {
          // The whole row is easier to hit; marked text is not a click.
          if (event.target.closest("a") === null && getSelection().isCollapsed) link.click();
        },
      },
    },
    h("th", { scope: "row", role: "rowheader", class: "c-at" }, h("span", { class: "under" }, dayOf(request.at)), " ", link),
    cell("outcome", outcomeChip(request.outcome), " ", raw("span", { class: "under" }, request.status ? String(request.status) : "")),
    cell("model", raw("span", { title: request.model }, request.model || t("unknown.sign"))),
    cell("route", raw("span", {}, request.route), raw("span", { class: "under" }, request.client === "other" ? "" : (request.client ?? ""))),
    cell("caller", raw("span", {}, request.caller)),
    cell("account", raw("span", {}, request.account ?? t("unknown.sign")), request.attempts > 1 && h("span", { class: "under" }, t("requests.attempts", { count: request.attempts }))),
    cell("first", span(request.first_text_seconds ?? request.first_event_seconds)),
    cell("seconds", span(request.seconds)),
    cell("tokens", number(request.input_tokens), h("span", { class: "under" }, tokensRest(request))),
    cell("error", raw("span", { title: request.error }, request.error ?? "")),
  );
  return {
    nodes: [row],
    update(now) {
      const wanted = hrefOf(now);
      if (link.getAttribute("href") !== wanted) link.setAttribute("href", wanted);
    },
  };
}

function tokensRest({ input_tokens: input, cached_tokens: cached, output_tokens: output }) {
  const parts = [];
  if (cached && input) parts.push(t("tokens.share", { share: percent(cached / input) }));
  if (output !== null) parts.push(t("tokens.out", { count: number(output) }));
  return parts.join(" · ");
}

function dayOf(at) {
  const isToday = new Date(at * 1000).toDateString() === new Date().toDateString();
  return isToday ? "" : weekday(at);
}

// One request

function detailScreen(context) {
  const { id, query } = context.route;
  const text = query.toString();
  const error = trouble();
  const body = h("div", { class: "stack" }, h("p", { class: "muted", role: "status" }, t("loading")));
  const control = new AbortController();
  const element = h(
    "div",
    {},
    h("p", { class: "back" }, h("a", { href: `#/requests${text === "" ? "" : `?${text}`}` }, icon("back"), h("span", {}, t("nav.requests")))),
    h("div", { class: "head" }, h("div", { class: "grow" }, h("h1", {}, t("request.title")), h("p", { class: "id" }, raw("code", {}, id), " ", copyButton(id)))),
    error.element,
    body,
  );
  get(`/requests/${encodeURIComponent(id)}`, control.signal).then(
    (request) => put(body, story(request)),
    (failure) => {
      if (failure.name === "AbortError") return;
      put(body);
      error.tell(failure);
    },
  );
  return { element, topic: "setup", stop: () => control.abort() };
}

function story(request) {
  const fact = (name, ...value) => h("div", {}, h("dt", {}, t(name)), h("dd", {}, ...value));
  const binding = request.binding ? raw("code", {}, request.binding) : t("request.unbound");
  return [
    h(
      "dl",
      { class: "facts panel" },
      fact("requests.outcome", outcomeChip(request.outcome), " ", raw("span", {}, [request.status || "", request.error ?? ""].filter(Boolean).join(" · "))),
      fact("requests.at", full(request.at)),
      fact("requests.model", raw("span", {}, request.model || t("unknown.sign"))),
      fact("requests.route", raw("span", {}, request.route), " ", h("span", { class: "muted" }, t(request.stream ? "request.stream" : "request.plain"))),
      fact("requests.caller", raw("span", {}, request.caller), " ", raw("span", { class: "muted" }, request.client ?? "")),
      fact("requests.account", raw("span", {}, request.account ?? t("unknown.sign"))),
      fact("request.rule", ruleText(request.rule)),
      fact("request.binding", binding),
      fact("requests.first", span(request.first_text_seconds ?? request.first_event_seconds)),
      fact("requests.seconds", span(request.seconds)),
      fact("request.input", tokensText(request.input_tokens, request.cached_tokens)),
      fact("request.output", request.output_tokens === null ? t("unknown.sign") : t("request.output.text", { output: number(request.output_tokens), reasoning: number(request.reasoning_tokens ?? 0) })),
      fact("request.source", term("source", request.usage_source) ?? request.usage_source ?? t("unknown.sign")),
      request.ledger && fact("usage.cost", cost(request.ledger)),
      fact("request.size", t("request.size.text", { request: bytes(request.request_bytes), answer: bytes(request.answer_bytes) })),
    ),
    h("section", { class: "panel", "aria-labelledby": "waterfall" }, h("h2", { id: "waterfall" }, t("request.waterfall")), waterfall(request)),
    h("section", { class: "panel", "aria-labelledby": "why" }, h("h2", { id: "why" }, t("request.why")), why(request)),
    request.capture && captured(request.capture),
  ];
}

/** What the ledger says that a request cost, and at which unit prices. */
function cost(row) {
  if (row.cost === null) return t("usage.no_price");
  const prices = Object.entries(row.prices).map(([name, price]) => `${name} ${price}`).join(" · ");
  return [raw("span", {}, `$${row.cost}`), row.is_billed && h("span", { class: "muted" }, " ", t("request.paid", { amount: `$${row.debit}` })), raw("span", { class: "under" }, prices)];
}

function ruleText(rule) {
  if (!rule) return t("unknown.sign");
  const words = term("rule", rule);
  return words === null ? raw("span", {}, rule) : words;
}

/**
 * Return what the time between two marks was spent on.
 *
 * A mark is a moment; what it ends is named by it, but for a second attempt, which begins with the failure of the first.
 */
export function phases(marks) {
  const found = [];
  let last = null;
  for (const one of marks) {
    if (last !== null) {
      const isRetry = one.mark === "picked" && (one.attempt ?? 1) > 1;
      found.push({
        name: isRetry ? "retry" : one.mark === "picked" && last.mark === "queued" ? "waited" : one.mark,
        attempt: isRetry ? (one.attempt ?? 1) - 1 : one.attempt,
        start: last.after_seconds,
        end: Math.max(last.after_seconds, one.after_seconds),
      });
    }
    last = one;
  }
  return found;
}

function waterfall(request) {
  const found = phases(request.marks ?? []);
  if (found.length === 0) return h("p", { class: "muted" }, t("request.no_marks"));
  const whole = Math.max(request.seconds ?? 0, found.at(-1).end, 0.000001);
  return scrollBox(
    t("request.waterfall"),
    h(
      "table",
      { class: "waterfall", "aria-label": t("request.waterfall") },
      h("thead", {}, h("tr", {}, ["request.phase", "request.course", "request.after", "request.took"].map((name, place) => h("th", { scope: "col", class: place > 1 ? "number" : null }, t(name))))),
      h(
        "tbody",
        {},
        found.map((one) => {
          const bar = h("span", { class: `step step-${one.name}` });
          bar.style.left = `${(one.start / whole) * 100}%`;
          bar.style.width = `${((one.end - one.start) / whole) * 100}%`;
          return h(
            "tr",
            {},
            h("th", { scope: "row" }, t(`phase.${one.name}`), one.attempt > 1 || one.name === "retry" ? h("span", { class: "under" }, t("request.attempt", { number: one.attempt })) : null),
            h("td", { class: "course" }, h("span", { class: "rail" }, bar)),
            h("td", { class: "number" }, span(one.start)),
            h("td", { class: "number" }, span(one.end - one.start)),
          );
        }),
      ),
    ),
  );
}

function why(request) {
  const steps = request.steps ?? [];
  if (steps.length === 0) return h("p", { class: "muted" }, t("request.no_steps"));
  return h(
    "ol",
    { class: "story" },
    steps.map(({ decision, attempts }, place) =>
      h(
        "li",
        {},
        decision === null
          ? h("p", {}, t("request.no_choice"))
          : h(
              "p",
              {},
              decision.account === null ? h("strong", {}, t("request.nobody")) : raw("strong", {}, decision.account),
              ": ",
              ruleText(decision.rule),
              " ",
              h("span", { class: "muted" }, t("request.strategy"), " ", raw("span", {}, decision.strategy)),
            ),
        attempts.map((one) =>
          h(
            "p",
            { class: "attempt" },
            icon(one.outcome === "ok" ? "ok" : "bad", 14),
            raw("span", {}, one.account),
            ": ",
            term("verdict", one.outcome) ?? raw("span", {}, one.outcome),
            one.status ? raw("span", { class: "muted" }, ` ${one.status}`) : null,
            h("span", { class: "muted" }, " ", t("request.attempt.when", { after: span(one.after_seconds), took: span(one.seconds) })),
          ),
        ),
        decision !== null && decision.candidates.length > 0 && candidates(decision, place + 1),
        decision !== null && decision.excluded.length > 0 && excluded(decision, place + 1),
      ),
    ),
  );
}

function candidates(decision, step) {
  const names = [...new Set(decision.candidates.flatMap((one) => Object.keys(one.parts)))];
  const rest = decision.compared - decision.candidates.length;
  return scrollBox(
    t("request.table", { name: t("request.score"), step }),
    h(
      "table",
      { class: "grid plain" },
      h("caption", {}, t("request.compared", { count: decision.compared }), rest > 0 ? ` ${t("request.and_more", { count: rest })}` : ""),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, t("requests.account")), h("th", { scope: "col", class: "number" }, t("request.score")), names.map((name) => raw("th", { scope: "col", class: "number" }, name)))),
      h(
        "tbody",
        {},
        decision.candidates.map((one) =>
          h(
            "tr",
            { class: one.account === decision.account ? "chosen" : null },
            h("th", { scope: "row" }, raw("span", {}, one.account), one.account === decision.account ? h("span", { class: "under" }, t("request.chosen")) : null),
            h("td", { class: "number" }, number(one.score, 3)),
            names.map((name) => h("td", { class: "number" }, one.parts[name] === undefined ? "" : number(one.parts[name], 3))),
          ),
        ),
      ),
    ),
  );
}

function excluded(decision, step) {
  const total = Object.values(decision.excluded_counts).reduce((sum, count) => sum + count, 0);
  const rest = total - decision.excluded.length;
  return scrollBox(
    t("request.table", { name: t("details.evidence"), step }),
    h(
      "table",
      { class: "grid plain" },
      h("caption", {}, t("request.excluded", { count: total }), rest > 0 ? ` ${t("request.and_more", { count: rest })}` : ""),
      h("thead", {}, h("tr", {}, ["requests.account", "details.rule", "details.evidence"].map((name) => h("th", { scope: "col" }, t(name))))),
      h("tbody", {}, decision.excluded.map((one) => h("tr", {}, raw("th", { scope: "row" }, one.account), h("td", {}, ruleText(one.rule)), raw("td", {}, one.evidence)))),
    ),
  );
}

function captured(capture) {
  return h(
    "section",
    { class: "panel", "aria-labelledby": "capture" },
    h("h2", { id: "capture" }, t("request.capture")),
    h("p", { class: "warn-line" }, icon("warn"), h("span", {}, t("request.capture.warning"))),
    capture.is_cut && h("p", { class: "muted" }, t("request.capture.cut")),
    h("h3", {}, t("request.capture.request")),
    snippet(capture.request ?? "", t("request.capture.request")),
    h("h3", {}, t("request.capture.answer")),
    snippet(capture.answer ?? "", t("request.capture.answer")),
  );
}

