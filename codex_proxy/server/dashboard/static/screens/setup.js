// What to paste where, and whether it works.

import { h, put, raw } from "../dom.js";
import { copyButton, heading } from "../parts.js";
import { t } from "../text.js";
import { clientsPanel, loadSetup, tryPanel } from "../trying.js";

export function setupScreen(context) {
  const head = heading(t("nav.setup"));
  const body = h("div", { class: "stack" });
  const element = h("div", {}, head.element, body);
  let trial = null;
  loadSetup(body, (setup) => {
    trial = tryPanel(setup.models);
    put(
      body,
      h(
        "dl",
        { class: "facts panel" },
        h("div", {}, h("dt", {}, t("setup.base")), h("dd", {}, raw("code", {}, setup.base_url), " ", copyButton(setup.base_url))),
        h("div", { class: "wide" }, h("dt", {}, t("setup.models")), raw("dd", { class: "models" }, setup.models.map((name) => h("code", {}, name)))),
      ),
      h("section", { class: "panel", "aria-labelledby": "try" }, h("h2", { id: "try" }, t("try.title")), h("p", { class: "muted" }, t("try.intro")), trial.element),
      h("section", { class: "panel", "aria-labelledby": "clients" }, h("h2", { id: "clients" }, t("setup.clients")), clientsPanel(setup, context.route.query.get("client"), (client) => context.setQuery({ client })).element),
    );
  });
  return {
    element,
    topic: "setup",
    // Another client chosen by the address is drawn by the panel itself.
    onQuery: () => {},
    stop: () => trial?.stop(),
  };
}
