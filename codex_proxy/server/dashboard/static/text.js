// Words by key and language, and numbers, times and spans as the reader's language writes them.

import { STRINGS } from "./strings.js";

export const LANGUAGES = [["en", "English"], ["zh-CN", "简体中文"]];

const PLACE = { en: 0, "zh-CN": 1 };
export const UNKNOWN = "–";

let language = first();
let formats = new Map();
let plural = new Intl.PluralRules(language);

function first() {
  const kept = remembered("language");
  if (kept in PLACE) return kept;
  return (navigator.language ?? "en").toLowerCase().startsWith("zh") ? "zh-CN" : "en";
}

/** Return what was remembered under *name* in this browser; null when nothing was. */
export function remembered(name) {
  try {
    return localStorage.getItem(`codex-proxy.${name}`);
  } catch {
    return null;
  }
}

/** Remember *value* in this browser, where it lets us; null forgets. */
export function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(`codex-proxy.${name}`);
    else localStorage.setItem(`codex-proxy.${name}`, value);
  } catch {
    // Private windows may refuse: the choice holds until the page is closed.
  }
}

export function currentLanguage() {
  return language;
}

export function setLanguage(wanted) {
  language = wanted in PLACE ? wanted : "en";
  formats = new Map();
  plural = new Intl.PluralRules(language);
  remember("language", language);
  document.documentElement.lang = language;
}

/**
 * Return the text of *key*.
 *
 * `{name}` is replaced by a value, `{name:one|other}` by the form that a number of that name asks for.
 */
export function t(key, values = {}) {
  const found = STRINGS[key];
  if (found === undefined) return key;
  return found[PLACE[language]].replace(/\{(\w+)(?::([^|}]*)\|([^}]*))?\}/g, (_, name, one, other) => {
    if (one !== undefined) return plural.select(Number(values[name])) === "one" ? one : other;
    return values[name] ?? "";
  });
}

/** Return the text of a word from a fixed set, such as a state; null when we have none for it. */
export function term(kind, word) {
  const key = `${kind}.${word}`;
  return key in STRINGS ? t(key) : null;
}

// English alone says nothing about 16:40 or 4:40 PM: there the reader's own region decides.
function locale() {
  const own = navigator.language ?? "en";
  return own.toLowerCase().startsWith(language.slice(0, 2)) ? own : language;
}

function format(name, make) {
  let found = formats.get(name);
  if (found === undefined) {
    found = make(locale());
    formats.set(name, found);
  }
  return found;
}

const isKnown = (value) => value !== null && value !== undefined && Number.isFinite(value);

export function number(value, digits = 0) {
  if (!isKnown(value)) return UNKNOWN;
  return format(`n${digits}`, (l) => new Intl.NumberFormat(l, { maximumFractionDigits: digits })).format(value);
}

/** A sum of dollars with two places at least. */
export function dollars(value, digits = 2) {
  const make = (l) =>
    new Intl.NumberFormat(l, {
      style: "currency", currency: "USD", currencyDisplay: "narrowSymbol", minimumFractionDigits: 2, maximumFractionDigits: digits,
    });
  return format(`usd${digits}`, make).format(value);
}

/** A rate or a count, short enough for a tile: 8.4, 312, 1.2K. */
export function short(value) {
  if (!isKnown(value)) return UNKNOWN;
  if (Math.abs(value) < 10 && !Number.isInteger(value)) return number(value, 1);
  if (Math.abs(value) < 1000) return number(value);
  const make = (l) => new Intl.NumberFormat(l, { notation: "compact", maximumFractionDigits: 1 });
  return format("compact", make).format(value);
}

export function percent(share, digits = 0) {
  if (!isKnown(share)) return UNKNOWN;
  const make = (l) => new Intl.NumberFormat(l, { style: "percent", maximumFractionDigits: digits });
  return format(`p${digits}`, make).format(share);
}

function unit(name, value, digits = 0) {
  const make = (l) =>
    new Intl.NumberFormat(l, {
      style: "unit", unit: name, unitDisplay: "narrow", maximumFractionDigits: digits,
    });
  return format(`u${name}${digits}`, make).format(value);
}

/** How long something took or takes, in the one or two units that matter. */
export function span(seconds) {
  if (!isKnown(seconds)) return UNKNOWN;
  const value = Math.max(0, seconds);
  if (value === 0) return unit("second", 0);
  if (value < 0.0095) return unit("millisecond", value * 1000, 1);
  if (value < 1) return unit("millisecond", Math.round(value * 1000));
  if (value < 9.95) return unit("second", value, 1);
  return coarse(value);
}

/** A span for countdowns and ages: whole seconds, at most two units. */
export function coarse(seconds) {
  if (!isKnown(seconds)) return UNKNOWN;
  const value = Math.max(0, Math.round(seconds));
  if (value < 60) return unit("second", value);
  const minutes = Math.floor(value / 60);
  if (minutes < 10) return joined("minute", minutes, "second", value % 60);
  if (minutes < 60) return unit("minute", minutes);
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return joined("hour", hours, "minute", minutes % 60);
  return joined("day", Math.floor(hours / 24), "hour", hours % 24);
}

function joined(first, a, second, b) {
  return b === 0 ? unit(first, a) : `${unit(first, a)} ${unit(second, b)}`;
}

export function bytes(count) {
  if (!isKnown(count)) return UNKNOWN;
  if (count < 1024) return unit("byte", count);
  if (count < 1024 * 1024) return unit("kilobyte", count / 1024, 1);
  return unit("megabyte", count / 1024 / 1024, 1);
}

/** A time of day with seconds. */
export function clock(at) {
  if (!isKnown(at)) return UNKNOWN;
  const make = (l) =>
    // As in the log; with AM and PM the seconds would not fit into a column.
    new Intl.DateTimeFormat(l, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
  return format("clock", make).format(at * 1000);
}

/** A time of day; with its day when that is not today's. */
export function moment(at, now = Date.now() / 1000) {
  if (!isKnown(at)) return UNKNOWN;
  const time = format("time", (l) => new Intl.DateTimeFormat(l, { hour: "2-digit", minute: "2-digit" }));
  if (new Date(at * 1000).toDateString() === new Date(now * 1000).toDateString()) return time.format(at * 1000);
  const near = Math.abs(at - now) < 6 * 86400;
  const day = near
    ? { weekday: "short", hour: "2-digit", minute: "2-digit" }
    : { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" };
  return format(`day${near}`, (l) => new Intl.DateTimeFormat(l, day)).format(at * 1000);
}

/** Date and time in full. */
export function full(at) {
  if (!isKnown(at)) return UNKNOWN;
  const make = (l) => new Intl.DateTimeFormat(l, { dateStyle: "medium", timeStyle: "medium" });
  return format("full", make).format(at * 1000);
}

export function weekday(at, timeZone = undefined) {
  const make = (l) => new Intl.DateTimeFormat(l, { weekday: "short", day: "numeric", timeZone });
  return format(`weekday${timeZone ?? ""}`, make).format(at * 1000);
}

export function hour(at) {
  const make = (l) => new Intl.DateTimeFormat(l, { hour: "2-digit", minute: "2-digit" });
  return format("time", make).format(at * 1000);
}

/** What a window is called: the daemon's short name, but for the words in it. */
export function windowName(name) {
  return term("length", name) ?? name;
}

/** Seconds since the epoch of a time as the daemon writes it: a number, or RFC 3339; null when there is none. */
export function seconds(value) {
  if (value === null || value === undefined || value === "") return null;
  if (typeof value === "number") return value;
  const found = Date.parse(value);
  return Number.isNaN(found) ? null : found / 1000;
}

/** Compare names as the reader sorts them, numbers in them by value. */
export function collate(a, b) {
  return format("sort", (l) => new Intl.Collator(l, { numeric: true, sensitivity: "base" })).compare(a, b);
}
