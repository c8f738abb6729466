// What owners did, the newest first.

import { debounced, h, raw } from "../dom.js";
import { heading } from "../parts.js";
import { full, seconds, t } from "../text.js";
import { listing, paged } from "./shared.js";

export function screen(context) {
  const view = { target: context.route.query.get("target") ?? "", actor: context.route.query.get("actor") ?? "" };
  const head = heading(t("gateway.audit"));
  const search = h("input", { type: "search", autocomplete: "off", spellcheck: "false", value: view.target, placeholder: t("audit.search"), "aria-label": t("audit.search") });
  search.addEventListener(
    "input",
    debounced(() => {
      view.target = search.value.trim();
      context.setQuery({ target: view.target });
      rows.load();
    }, 250),
  );
  const list = listing(
    t("gateway.audit"),
    [
      ["requests.at", (row) => h("time", { datetime: row.at }, full(seconds(row.at)))],
      ["audit.actor", (row) => raw("span", {}, row.actor)],
      ["audit.action", (row) => raw("span", {}, row.action)],
      ["audit.target", (row) => raw("code", {}, row.target)],
      ["audit.change", (row) => changeOf(row), "wide-cell"],
    ],
    (row) => row.id,
  );
  const rows = paged({
    path: (before) => `/admin/audit?${new URLSearchParams({ limit: "100", ...(view.target && { target: view.target }), ...(view.actor && { actor: view.actor }), ...(before !== null && { before }) })}`,
    rowsOf: (page) => page.entries,
    show: list.show,
  });
  rows.load();
  return {
    element: h("div", {}, head.element, h("div", { class: "filters" }, h("label", { class: "field search" }, search)), list.element, rows.element),
    onReconnect: rows.load,
    stop: rows.stop,
  };
}

/** What was before and what is now, of what differs. */
function changeOf(row) {
  const [before, after] = [read(row.before), read(row.after)];
  const names = [...new Set([...Object.keys(before), ...Object.keys(after)])].filter((name) => JSON.stringify(before[name]) !== JSON.stringify(after[name]));
  return names.map((name) =>
    raw("span", { class: "change" }, h("b", {}, name), " ", row.before !== null && [h("del", {}, said(before[name])), " → "], h("span", {}, said(after[name]))),
  );
}

function read(text) {
  try {
    const found = text === null ? {} : JSON.parse(text);
    return typeof found === "object" && found !== null ? found : { "": found };
  } catch {
    return { "": text };
  }
}

function said(value) {
  if (value === undefined || value === null) return t("unknown.sign");
  return typeof value === "string" ? value : JSON.stringify(value);
}
