// The gateway: its places below one heading, each loaded when it is first opened.

import { h, mark, put } from "../dom.js";
import { trouble } from "../parts.js";
import { t } from "../text.js";

const PLACES = ["keys", "users", "usage", "upstreams", "prices", "audit"];

// What can be seen without a ledger.
const ALWAYS = "upstreams";

export function gatewayScreen(context) {
  const [asked, ...rest] = (context.route.id ?? "").split("/");
  const isOff = context.session.ledger === "off";
  const place = PLACES.includes(asked) ? asked : isOff ? ALWAYS : PLACES[0];
  const links = PLACES.map((name) => mark(h("a", { href: `#/gateway/${name}` }, t(`gateway.${name}`)), "aria-current", name === place ? "page" : null));
  const id = rest.length > 0 && rest[0] !== "" ? rest.join("/") : null;
  context.title(t(`gateway.${place}`));
  return later(
    "setup",
    async () => {
      if (isOff && place !== ALWAYS) {
        const { offScreen } = await import("../gateway/shared.js");
        return offScreen(t(`gateway.${place}`));
      }
      const module = await import(`../gateway/${place}.js`);
      return module.screen({ ...context, id });
    },
    h("nav", { class: "places", "aria-label": t("nav.gateway") }, links),
  );
}

/** The page of a key's holder: what it used, what it may, how to connect. */
export function ownScreen(context) {
  return later("own", async () => (await import("../gateway/own.js")).screen(context));
}

/** The holder's second page. */
export function connectScreen(context) {
  return later("own", async () => (await import("../gateway/own.js")).connectScreen(context));
}

/** A screen that is there once its module is; *topic* is what it hears. */
function later(topic, load, above = null) {
  const body = h("div", {}, h("h1", { class: "visually-hidden" }, t("loading")));
  const element = h("div", {}, above, body);
  let inner = null;
  let isGone = false;
  load().then(
    (found) => {
      if (isGone) {
        found.stop?.();
        return;
      }
      inner = found;
      const hadFocus = body.contains(document.activeElement);
      put(body, found.element);
      if (!hadFocus) return;
      const heading = body.querySelector("h1");
      mark(heading, "tabindex", "-1");
      heading?.focus({ preventScroll: true });
    },
    () => {
      const error = trouble();
      put(body, h("h1", {}, t("lost.title")), error.element);
      error.tell(new Error(t("error.unreachable")));
    },
  );
  return {
    element,
    topic,
    onEvent: (name, data) => inner?.onEvent?.(name, data),
    onReconnect: () => inner?.onReconnect?.(),
    onQuery: (query) => inner?.onQuery?.(query),
    tick: (now) => inner?.tick?.(now),
    stop() {
      isGone = true;
      inner?.stop?.();
    },
  };
}
