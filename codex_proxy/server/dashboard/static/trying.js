// What to paste into a client, and a request that shows each step on its way.

import { get, stream } from "./api.js";
import { h, put, raw } from "./dom.js";
import { icon } from "./icons.js";
import { choice, snippet, trouble } from "./parts.js";
import { span, t, term } from "./text.js";

const DIALECTS = [["chat", "Chat Completions"], ["responses", "Responses"], ["messages", "Messages"]];

/** A button that sends a small request and shows what becomes of it; *onDone* hears whether it was answered. */
export function tryPanel(models, onDone = () => {}) {
  let dialect = "responses";
  let model = models[0] ?? "";
  let control = null;
  const steps = h("ol", { class: "try-steps", "aria-live": "polite" });
  const end = h("p", { class: "try-end", role: "status" });
  const error = trouble();
  const go = h("button", { type: "button", class: "primary", on: { click: run } }, icon("play"), h("span", {}, t("try.go")));
  const element = h(
    "div",
    { class: "try" },
    h(
      "div",
      { class: "filters" },
      choice("dialect", t("try.dialect"), DIALECTS.map(([id, name]) => [id, name, true]), dialect, (value) => (dialect = value)).element,
      choice("try-model", t("requests.model"), models.map((name) => [name, name, true]), model, (value) => (model = value)).element,
      go,
    ),
    steps,
    error.element,
    end,
  );

  async function run() {
    control?.abort();
    control = new AbortController();
    go.disabled = true;
    put(steps);
    put(end);
    error.tell(null);
    let isDone = false;
    try {
      await stream("/try", { dialect, model }, (name, data) => {
        if (name === "step") step(data);
        if (name === "done") {
          isDone = true;
          done(data);
        }
      }, control.signal);
      if (!isDone) error.tell(new Error(t("try.cut")));
    } catch (failure) {
      if (failure.name !== "AbortError") error.tell(failure);
    }
    go.disabled = false;
  }

  function step(data) {
    const kind = data.ok === false ? "bad" : data.ok === true ? "ok" : "wait";
    steps.append(
      h(
        "li",
        { class: kind },
        icon(kind, 16),
        h("span", {}, term("try.step", data.step) ?? raw("span", {}, data.step)),
        raw("span", { class: "muted" }, data.text ?? ""),
        h("span", { class: "number" }, span(data.after_seconds)),
      ),
    );
  }

  function done(data) {
    const link = data.request_id && h("a", { href: `#/requests/${encodeURIComponent(data.request_id)}` }, t("try.look"));
    put(end, icon(data.ok ? "ok" : "bad"), " ", h("strong", {}, t(data.ok ? "try.ok" : "try.bad")), " ", raw("span", {}, data.text ?? ""), " ", link);
    end.className = `try-end ${data.ok ? "good" : "bad"}`;
    onDone(data.ok);
  }

  return { element, stop: () => control?.abort() };
}

/** The clients, one at a time, and what each needs. */
export function clientsPanel(setup, wanted = null, onChoose = () => {}) {
  const field = h("input", { type: "text", id: "own-key", autocomplete: "off", spellcheck: "false", placeholder: "YOUR_KEY" });
  const list = h("div", { class: "tabs", role: "tablist", "aria-label": t("setup.clients") });
  const panel = h("div", { role: "tabpanel", id: "client-panel", tabindex: "0", class: "client" });
  const tabs = setup.clients.map((client) =>
    h("button", { type: "button", role: "tab", id: `tab-${client.id}`, "aria-controls": "client-panel", translate: "no", on: { click: () => choose(client, true) } }, client.name),
  );
  put(list, tabs);
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const place = (tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length;
    tabs[place].focus();
    choose(setup.clients[place], true);
  });
  let current = setup.clients.find((client) => client.id === wanted) ?? setup.clients[0];

  function choose(client, isAsked) {
    current = client;
    tabs.forEach((tab, place) => {
      const isIt = setup.clients[place] === client;
      tab.setAttribute("aria-selected", isIt ? "true" : "false");
      tab.tabIndex = isIt ? 0 : -1;
    });
    panel.setAttribute("aria-labelledby", `tab-${client.id}`);
    draw();
    if (isAsked) onChoose(client.id);
  }

  function draw() {
    // The key is put into what is copied here and goes nowhere else.
    const key = field.value.trim();
    put(
      panel,
      current.steps.map((step) => [
        term("setup.step", step.title) === null ? raw("h3", {}, step.title) : h("h3", {}, term("setup.step", step.title)),
        snippet(key === "" ? step.text : step.text.replaceAll("YOUR_KEY", key), step.title),
      ]),
    );
  }

  field.addEventListener("input", draw);
  if (current !== undefined) choose(current, false);
  return {
    element: h(
      "div",
      {},
      setup.needs_key
        ? h("div", { class: "field wide" }, h("label", { for: "own-key" }, t("setup.key")), field, h("span", { class: "muted" }, t("setup.key.help")))
        : h("p", { class: "muted" }, t("setup.no_key")),
      list,
      panel,
    ),
  };
}

/** Ask for what both parts need and draw it into *into*, or what went wrong. */
export async function loadSetup(into, draw) {
  const error = trouble();
  put(into, h("p", { class: "muted", role: "status" }, t("loading")));
  try {
    draw(await get("/setup"));
  } catch (failure) {
    put(into, error.element);
    error.tell(failure);
  }
}
