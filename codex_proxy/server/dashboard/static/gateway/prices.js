// Unit prices: what the package brings, an owner's own and from when they count, and history priced anew.

import { post, remove } from "../api.js";
import { debounced, h, put, raw, say, show } from "../dom.js";
import { icon } from "../icons.js";
import { choice, confirm, failureText, heading, trouble } from "../parts.js";
import { collate, number, t } from "../text.js";
import { form, group, momentField, moneyField, numberField, selectField, textField } from "./forms.js";
import { act, listing, money, watching, when } from "./shared.js";

const TIERS = ["standard", "flex", "batch", "priority", "ultrafast"];
const RATES = ["input", "cached", "cache_write", "output"];

export function screen(context) {
  let found = { prices: [], own: [] };
  let needle = context.route.query.get("q") ?? "";
  let tier = TIERS.includes(context.route.query.get("tier")) ? context.route.query.get("tier") : "standard";
  const head = heading(
    t("gateway.prices"),
    h("button", { type: "button", on: { click: rerate } }, t("prices.rerate")),
    h("button", { type: "button", class: "primary", on: { click: () => set(null) } }, icon("plus"), h("span", {}, t("prices.set"))),
  );
  const error = trouble();
  const search = h("input", { type: "search", autocomplete: "off", spellcheck: "false", value: needle, placeholder: t("prices.search"), "aria-label": t("prices.search") });
  search.addEventListener(
    "input",
    debounced(() => {
      needle = search.value.trim().toLowerCase();
      context.setQuery({ q: needle });
      draw();
    }, 120),
  );
  const tiers = choice("tier", t("prices.tier"), [["all", t("all")], ...TIERS.map((one) => [one, one, true])], tier, (wanted) => {
    tier = wanted;
    context.setQuery({ tier: tier === "standard" ? "" : tier });
    draw();
  });
  const rate = (name) => [`prices.${name}`, (one) => [money(one[name]), one.long !== null && h("span", { class: "under" }, money(one.long[name]))], "number"];
  const list = listing(
    t("gateway.prices"),
    [
      ["requests.model", (one) => [raw("strong", {}, one.model), one.aliases.length > 0 && raw("span", { class: "under" }, one.aliases.join(", "))]],
      ["prices.tier", (one) => raw("span", {}, one.tier)],
      ...["input", "cached", "cache_write", "output"].map(rate),
      ["prices.source", (one) => [t(one.source === "own" ? "prices.own" : "prices.package"), one.long !== null && h("span", { class: "under" }, t("prices.long.text", { count: number(one.long_above) }))]],
      [null, (one) => h("span", { class: "row-acts" }, act("prices.set.one", () => set(one)), one.source === "own" && act("prices.end", () => end(one), { kind: "danger-quiet" })), "acts"],
    ],
    (one) => one.id,
  );
  const own = h("section", { class: "panel", hidden: true, "aria-labelledby": "own-prices" });
  const history = listing(
    t("prices.history"),
    [
      ["requests.model", (one) => raw("strong", {}, one.model)],
      ["prices.tier", (one) => raw("span", {}, one.tier)],
      ["prices.from", (one) => when(one.effective_from, context.now())],
      ["prices.input", (one) => (one.price === null ? h("span", { class: "muted" }, t("prices.ended")) : money(one.price.input)), "number"],
      ["prices.output", (one) => (one.price === null ? "" : money(one.price.output)), "number"],
    ],
    (one) => one.id,
  );
  put(own, h("h2", { id: "own-prices" }, t("prices.history")), history.element);
  const element = h("div", {}, head.element, h("p", { class: "muted" }, t("prices.unit")), h("div", { class: "filters" }, h("label", { class: "field search" }, search), tiers.element), error.element, own, list.element);
  const prices = watching(
    () => "/admin/prices",
    (answer) => {
      found = answer;
      draw();
    },
    error,
  );

  function draw() {
    const shown = found.prices.filter((one) => (tier === "all" || one.tier === tier || one.source === "own") && (needle === "" || [one.model, ...one.aliases].some((name) => name.toLowerCase().includes(needle))));
    shown.sort((a, b) => (a.source === b.source ? 0 : a.source === "own" ? -1 : 1) || collate(a.model, b.model) || TIERS.indexOf(a.tier) - TIERS.indexOf(b.tier));
    list.show(shown);
    history.show(found.own);
    show(own, found.own.length > 0);
    say(head.news, t("prices.count", { count: new Set(shown.map((one) => one.model)).size }));
  }

  function rates(prefix, values, isNeeded) {
    return RATES.map((name) => moneyField(`${prefix}${name}`, t(`prices.${name}`), { value: values?.[name] ?? "", required: isNeeded && (name === "input" || name === "output") }));
  }

  async function set(one) {
    const plain = rates("", one, true);
    const long = rates("long.", one?.long, false);
    const above = numberField("long_above", t("prices.long_above"), { value: one?.long_above || null, placeholder: "272000" });
    const done = await form({
      title: one === null ? t("prices.set") : t("prices.set.title", { model: one.model }),
      intro: t("prices.set.text"),
      fields: [
        textField("model", t("requests.model"), { value: one?.model ?? "", required: true, most: 200 }),
        selectField("tier", t("prices.tier"), TIERS.map((tier) => [tier, tier, true]), { value: one?.tier ?? "standard" }),
        momentField("effective_from", t("prices.from"), { hint: t("prices.from.hint") }),
        ...plain,
        group(t("prices.long"), [...long, above], { value: () => null, isOpen: one !== null && one.long !== null }),
      ],
      verb: t("form.save"),
      wide: true,
      submit: (values) => {
        const dear = Object.fromEntries(RATES.map((name, place) => [name, long[place].value()]));
        const isLong = Object.values(dear).some((value) => value !== null);
        // What a request may have at most is not asked for here, and stays.
        const bounds = one !== null && one.model === values.model ? { reads: one.reads || null, writes: one.writes || null } : {};
        return post("/admin/prices", { ...bounds, ...values, ...(isLong && { long: dear, long_above: above.value() }) });
      },
    });
    if (done !== null) prices.again();
  }

  async function end(one) {
    const isMeant = await confirm({ title: t("prices.end.title", { model: one.model }), text: t("prices.end.text"), verb: t("prices.end"), isDangerous: true });
    if (!isMeant) return;
    try {
      await remove(`/admin/prices/${encodeURIComponent(one.own_id)}`);
    } catch (failure) {
      context.toast(failureText(failure), "bad");
    }
    prices.again();
  }

  /** First what would change is told, then it is asked whether that is meant. */
  async function rerate() {
    const asked = await form({
      title: t("prices.rerate"),
      intro: t("prices.rerate.text"),
      fields: [
        momentField("since", t("prices.since"), { value: new Date((context.now() - 86400) * 1000).toISOString() }),
        momentField("until", t("prices.until"), { hint: t("prices.until.hint") }),
        textField("model", t("requests.model"), { hint: t("prices.model.hint") }),
        textField("reason", t("users.reason"), { required: true, most: 200 }),
      ],
      verb: t("prices.rerate.look"),
      submit: async (values) => {
        const wanted = { ...values, model: values.model === "" ? null : values.model };
        return { wanted, would: await post("/admin/prices/rerate", { ...wanted, dry_run: true }) };
      },
    });
    if (asked === null) return;
    const { wanted, would } = asked;
    if (would.changed === 0) {
      context.toast(t("prices.rerate.nothing"));
      return;
    }
    const isMeant = await confirm({
      title: t("prices.rerate"),
      text: t("prices.rerate.would", { count: would.changed, turns: number(would.changed), before: money(would.before), after: money(would.after) }),
      verb: t("prices.rerate.go"),
      isDangerous: true,
    });
    if (!isMeant) return;
    try {
      const done = await post("/admin/prices/rerate", { ...wanted, dry_run: false });
      context.toast(t("prices.rerate.done", { count: done.changed, turns: number(done.changed) }));
    } catch (failure) {
      context.toast(failureText(failure), "bad");
    }
  }

  prices.load();
  return { element, onReconnect: prices.again, tick: prices.tick, stop: prices.stop };
}
