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
  const names = [...new Set([...Object.keys(before), ...Object.keys(after)])].filter((name) => said(name, before[name]) !== said(name, after[name]));
  return names.map((name) => {
    const [was, is] = [said(name, before[name]), said(name, after[name])];
    return raw("span", { class: "change" }, h("b", {}, name), " ", was !== "" && h("del", {}, was), was !== "" && is !== "" && " → ", is);
  });
}

function read(text) {
  try {
    const found = text === null ? {} : JSON.parse(text);
    return typeof found === "object" && found !== null ? found : { "": found };
  } catch {
    return { "": text };
  }
}

const MOMENTS = ["since", "until", "expires", "effective_from"];

/** A value in a line; empty where there is nothing to say. */
function said(name, value) {
  if (value === undefined || value === null) return "";
  if (typeof value === "number" && MOMENTS.includes(name)) return full(value / 1000);
  if (typeof value !== "object") return String(value);
  const parts = Object.entries(value).map(([key, one]) => (Array.isArray(value) ? said(name, one) : `${key}: ${said(key, one)}`));
  return parts.join(", ");
}
