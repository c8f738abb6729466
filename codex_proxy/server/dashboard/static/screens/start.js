// From nothing to an answer in three steps: an account, a test, a client.

import { get } from "../api.js";
import { importPanel, loginPanel } from "../adding.js";
import { h, mark, put, say, show } from "../dom.js";
import { icon } from "../icons.js";
import { heading, segments } from "../parts.js";
import { t } from "../text.js";
import { clientsPanel, loadSetup, tryPanel } from "../trying.js";

export function startScreen(context) {
  const head = heading(t("start.title"));
  say(head.news, t("start.intro"));
  const login = loginPanel();
  const files = importPanel();
  const way = segments(t("start.way"), [["login", t("device.title")], ["import", t("import.title")]], "login", choose);
  const state = h("p", { class: "try-end good", role: "status", hidden: true });
  const steps = [
    step(1, t("start.account"), h("div", {}, way.element, login.element, files.element, state)),
    step(2, t("start.try"), h("div", { class: "stack" })),
    step(3, t("start.client"), h("div", { class: "stack" })),
  ];
  const element = h("div", {}, head.element, h("ol", { class: "wizard" }, steps.map((one) => one.element)), h("p", {}, h("a", { href: "#/now" }, t("start.leave"))));
  let count = null;
  let trial = null;
  let isAsked = false;

  function choose(name) {
    show(login.element, name === "login");
    show(files.element, name === "import");
  }

  function at(place) {
    steps.forEach((one, number) => one.tell(number < place ? "done" : number === place ? "now" : "later"));
  }

  function onNow({ accounts }) {
    if (accounts.total === count) return;
    count = accounts.total;
    show(state, count > 0);
    put(state, icon("ok"), " ", t("start.have", { count }));
    if (count === 0) at(0);
    else if (!isAsked) {
      isAsked = true;
      at(1);
      // Its models are known a moment after it has come in.
      loadSetup(steps[1].body, offer);
    }
  }

  function offer(setup) {
    trial = tryPanel(setup.models, (isOk) => isOk && at(2));
    put(steps[1].body, h("p", { class: "muted" }, t("try.intro")), trial.element);
    put(steps[2].body, clientsPanel(setup).element);
  }

  /** A fresh account's models may not be known at first: asked again until there are some. */
  async function again() {
    try {
      const setup = await get("/setup");
      if (setup.models.length > 0) offer(setup);
    } catch {
      // Asked again with the next tick.
    }
  }

  choose("login");
  at(0);
  let ticks = 0;
  return {
    element,
    topic: "now",
    onEvent: (name, data) => name === "now" && onNow(data),
    tick() {
      ticks += 1;
      const select = steps[1].body.querySelector("select[name=try-model]");
      if (ticks % 3 === 0 && select !== null && select.options.length === 0) again();
    },
    stop() {
      login.stop();
      trial?.stop();
    },
  };
}

function step(number, title, body) {
  const sign = h("span", { class: "sign", "aria-hidden": "true" });
  const word = h("span", { class: "visually-hidden" });
  const element = h("li", {}, sign, h("div", { class: "grow" }, h("h2", {}, title, " ", word), body));
  return {
    element,
    body,
    tell(kind) {
      element.className = `wizard-${kind}`;
      mark(element, "aria-current", kind === "now" ? "step" : null);
      put(sign, kind === "done" ? icon("ok") : String(number));
      say(word, kind === "done" ? t("start.done") : "");
      show(body, kind !== "later");
    },
  };
}
