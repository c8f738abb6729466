// Pieces that more than one screen is made of.

import { ApiError } from "./api.js";
import { h, mark, put, raw, say, show } from "./dom.js";
import { icon, stateMark } from "./icons.js";
import { coarse, number, percent, t, term } from "./text.js";

/** Say what went wrong, in the daemon's words where it has some. */
export function failureText(error) {
  if (!(error instanceof ApiError)) return String(error?.message ?? error);
  if (error.status === 0) return t("error.unreachable");
  if (error.status === 429 && error.retryAfter !== null) {
    return t("error.throttled", { span: coarse(error.retryAfter) });
  }
  if (error.code === "ledger_unavailable") return t("error.ledger");
  return error.message !== "" ? error.message : t("error.status", { status: error.status });
}

/** A screen's head: what it is called, a sentence of news, what can be done. */
export function heading(title, ...actions) {
  const news = h("p", { class: "news" });
  return {
    element: h("div", { class: "head" }, h("div", { class: "grow" }, h("h1", {}, title), news), h("div", { class: "actions" }, ...actions)),
    news,
  };
}

/** A chip with the state's own shape, colour and word. */
export function stateChip(status) {
  return h("span", { class: `chip state-${status}` }, stateMark(status), h("span", {}, term("state", status) ?? status));
}

const OUTCOME_ICONS = { completed: "ok", incomplete: "cut", failed: "bad", caller_gone: "gone" };

export function outcomeChip(outcome) {
  return h(
    "span",
    { class: `outcome outcome-${outcome}` },
    icon(OUTCOME_ICONS[outcome] ?? "info", 14),
    h("span", {}, term("outcome", outcome) ?? outcome),
  );
}

/** What an alert is called. */
export function alertName(name) {
  const words = term("alert", name);
  return words === null ? raw("strong", {}, name) : h("strong", { title: name }, words);
}

/** A bar for a share that is used up; the fuller, the denser its pattern, so that colour is not needed. */
export function meter(label) {
  const fill = h("span", { class: "fill" });
  const text = h("span", { class: "meter-text" });
  const track = h("span", { class: "track", role: "meter", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "100" }, fill);
  return {
    element: h("span", { class: "meter" }, track, text),
    /** *used* in percent; null is unknown. */
    update(used) {
      const isKnown = used !== null && used !== undefined;
      const width = isKnown ? `${Math.min(100, Math.max(0, used))}%` : "0%";
      // Also the same width makes a browser lay out anew.
      if (fill.style.width !== width) fill.style.width = width;
      mark(track, "data-level", !isKnown ? "unknown" : used >= 99.5 ? "full" : used >= 80 ? "high" : "calm");
      mark(track, "aria-valuenow", isKnown ? Math.round(used) : 0);
      const words = isKnown ? percent(used / 100) : t("unknown");
      mark(track, "aria-valuetext", words);
      say(text, words);
    },
  };
}

/** A bar for a share that is good to have much of. */
export function shareBar(share) {
  const fill = h("span", { class: "fill" });
  const track = h("span", { class: "track track-good", "aria-hidden": "true" }, fill);
  fill.style.width = `${Math.min(100, Math.max(0, (share ?? 0) * 100))}%`;
  return h("span", { class: "meter" }, track, h("span", { class: "meter-text" }, percent(share)));
}

/** A box for what may be wider than the screen; where it is, it can be scrolled by keys too. */
export function scrollBox(label, ...children) {
  const box = h("div", { class: "scroll" }, children);
  new ResizeObserver(() => {
    const isWider = box.scrollWidth > box.clientWidth + 1;
    mark(box, "tabindex", isWider ? "0" : null);
    mark(box, "role", isWider ? "region" : null);
    mark(box, "aria-label", isWider ? label : null);
  }).observe(box);
  return box;
}

/** One figure with its name. */
export function tile(label, hint = null) {
  const value = h("dd", { class: "value" }, t("unknown.sign"));
  const extra = h("dd", { class: "extra" });
  return {
    element: h("div", { class: "tile", title: hint }, h("dt", {}, label), value, extra),
    update(text, more = "") {
      say(value, text);
      say(extra, more);
    },
  };
}

/** A button that puts a text on the clipboard, and says that it did. */
export function copyButton(text, label = t("copy")) {
  const word = h("span", { "aria-live": "polite" }, label);
  const button = h(
    "button",
    {
      type: "button", class: "copy",
      on: {
        click: async () => {
          const isDone = await copy(typeof text === "function" ? text() : text);
          say(word, isDone ? t("copied") : t("copy.failed"));
          setTimeout(() => say(word, label), 2000);
        },
      },
    },
    icon("copy", 14),
    word,
  );
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // The clipboard is there on loopback and over TLS only; the old way works elsewhere.
    const field = h("textarea", { class: "visually-hidden" });
    field.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(field);
    field.select();
    const isDone = document.execCommand("copy");
    field.remove();
    return isDone;
  }
}

/** A text to paste somewhere, with a button that copies it. */
export function snippet(text, label) {
  return h(
    "div",
    { class: "snippet" },
    raw("pre", { tabindex: "0", role: "region", "aria-label": label }, h("code", {}, text)),
    copyButton(text),
  );
}

/** A dialog that is shown at once and gone when it is closed; *onClose* hears of it. */
export function dialog(title, body, { onClose = null, wide = false } = {}) {
  const id = `dialog-${Math.random().toString(36).slice(2)}`;
  const box = h(
    "dialog",
    { "aria-labelledby": id, class: wide ? "wide" : null },
    h(
      "div",
      { class: "dialog-head" },
      h("h2", { id }, title),
      h("button", { type: "button", class: "quiet", "aria-label": t("close"), on: { click: () => box.close() } }, icon("bad", 16)),
    ),
    body,
  );
  // What opened it may have been drawn anew meanwhile: then the browser cannot give the focus back.
  const opener = document.activeElement;
  box.addEventListener("close", () => {
    box.remove();
    onClose?.();
    if (opener?.isConnected) opener.focus();
  });
  // A click beside it closes it, as Escape does.
  box.addEventListener("mousedown", (event) => {
    if (event.target === box) box.close();
  });
  document.body.append(box);
  box.showModal();
  return box;
}

/** Ask whether that is meant; true when it is. */
export function confirm({ title, text, verb, isDangerous = false }) {
  return new Promise((resolve) => {
    let answer = false;
    const yes = h(
      "button",
      {
        type: "button", class: isDangerous ? "danger" : "primary", value: "yes",
        on: {
          click: () => {
            answer = true;
            box.close();
          },
        },
      },
      verb,
    );
    const no = h("button", { type: "button", autofocus: isDangerous, on: { click: () => box.close() } }, t("cancel"));
    const box = dialog(title, h("div", {}, h("p", {}, text), h("div", { class: "dialog-actions" }, no, yes)), {
      onClose: () => resolve(answer),
    });
    (isDangerous ? no : yes).focus();
  });
}

/** A select with a label beside it. */
export function choice(name, label, options, value, onChange) {
  const select = h("select", { name, on: { change: () => onChange(select.value) } });
  const fill = (found, wanted) => {
    const key = JSON.stringify(found);
    if (select.dataset.key !== key) {
      select.dataset.key = key;
      put(
        select,
        found.map(([option, words, isRaw]) => h("option", { value: option, translate: isRaw ? "no" : null }, words)),
      );
    }
    if (select.value !== wanted) select.value = wanted;
  };
  fill(options, value);
  return { element: h("label", { class: "field" }, h("span", {}, label), select), select, fill };
}

/** Buttons of which one is pressed. */
export function segments(label, options, value, onChange) {
  const buttons = new Map();
  const element = h("div", { class: "segments", role: "group", "aria-label": label });
  const press = (wanted) => {
    for (const [option, button] of buttons) mark(button, "aria-pressed", option === wanted ? "true" : "false");
  };
  for (const [option, words] of options) {
    const button = h(
      "button",
      {
        type: "button",
        on: {
          click: () => {
            press(option);
            onChange(option);
          },
        },
      },
      words,
    );
    buttons.set(option, button);
    element.append(button);
  }
  press(value);
  return { element, press };
}

/** A place for what went wrong in a part of a screen. */
export function trouble() {
  const element = h("p", { class: "trouble", role: "alert", hidden: true });
  return {
    element,
    tell(error) {
      show(element, error !== null);
      put(element, error === null ? null : [icon("warn"), h("span", {}, failureText(error))]);
    },
  };
}

/** Tokens, with the share of them that came from the cache. */
export function tokensText(input, cached) {
  if (input === null || input === undefined) return t("unknown.sign");
  return cached && input ? t("tokens.cached", { input: number(input), share: percent(cached / input) }) : number(input);
}
