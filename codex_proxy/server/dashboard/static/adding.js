// Getting accounts in: a login by device code, or files that are there already.

import { get, post, remove } from "./api.js";
import { h, put, raw, say, show } from "./dom.js";
import { icon } from "./icons.js";
import { copyButton, dialog, failureText, trouble } from "./parts.js";
import { coarse, number, t } from "./text.js";

const POLL_MS = 2000;

// Account files are a few kilobytes; what is larger is something else.
const MOST_BYTES = 4 * 1024 * 1024;

/** A login by device code; `stop()` gives it up. *onDone* hears the new account's alias. */
export function loginPanel(onDone = () => {}) {
  const error = trouble();
  const state = h("p", { role: "status" });
  const code = raw("strong", { class: "code" });
  const link = h("a", { target: "_blank", rel: "noopener noreferrer", class: "button primary" }, t("device.open"));
  const left = h("span", { class: "muted" });
  const steps = h(
    "ol",
    { class: "steps", hidden: true },
    h("li", {}, h("span", {}, t("device.code")), h("div", { class: "code-row" }, code, copyButton(() => code.textContent))),
    h("li", {}, h("span", {}, t("device.page")), h("div", {}, link)),
    h("li", {}, h("span", {}, t("device.wait")), " ", left),
  );
  const begin = h("button", { type: "button", class: "primary", on: { click: start } }, t("device.begin"));
  const element = h("div", { class: "login-panel" }, h("p", {}, t("device.intro")), begin, steps, state, error.element);
  let login = null;
  let timer = 0;
  let isStopped = false;

  async function start() {
    begin.disabled = true;
    error.tell(null);
    say(state, "");
    try {
      login = await post("/login");
    } catch (failure) {
      error.tell(failure);
      begin.disabled = false;
      return;
    }
    if (isStopped) return cancel();
    show(begin, false);
    show(steps, true);
    say(code, login.user_code);
    link.href = /^https?:/i.test(login.url) ? login.url : "#";
    timer = setTimeout(poll, POLL_MS);
    link.focus();
  }

  async function poll() {
    let found;
    try {
      found = await get(`/login/${encodeURIComponent(login.id)}`);
    } catch (failure) {
      if (failure.status !== 0) {
        finish();
        error.tell(failure);
        return;
      }
      // Nobody there for a moment: the login does not end by that.
      found = { state: "waiting" };
    }
    if (isStopped) return;
    if (found.state === "waiting") {
      say(left, t("device.left", { span: coarse(login.expires_at - Date.now() / 1000) }));
      timer = setTimeout(poll, POLL_MS);
      return;
    }
    finish();
    if (found.state === "done") {
      put(state, icon("ok"), " ", t("device.done"), " ", raw("strong", {}, found.alias ?? ""));
      onDone(found.alias);
    } else {
      error.tell(new Error(`${t("device.failed")} ${found.message ?? ""}`));
    }
  }

  function finish() {
    login = null;
    show(steps, false);
    show(begin, true);
    begin.disabled = false;
  }

  function cancel() {
    if (login !== null) remove(`/login/${encodeURIComponent(login.id)}`).catch(() => {});
    login = null;
  }

  return {
    element,
    stop() {
      isStopped = true;
      clearTimeout(timer);
      cancel();
    },
  };
}

/** Import by choosing, dropping or pasting; *onDone* hears how many came in. */
export function importPanel(onDone = () => {}) {
  const error = trouble();
  const input = h("input", { type: "file", multiple: true, class: "visually-hidden", id: "import-files", accept: ".json,.jsonl,.txt,application/json,text/plain", on: { change: () => take([...input.files]) } });
  const zone = h(
    "div",
    {
      class: "drop",
      on: {
        dragover: (event) => {
          event.preventDefault();
          zone.classList.add("over");
        },
        dragleave: () => zone.classList.remove("over"),
        drop: (event) => {
          event.preventDefault();
          zone.classList.remove("over");
          take([...event.dataTransfer.files]);
        },
      },
    },
    icon("plus", 20),
    h("span", {}, t("import.drop")),
    h("label", { for: "import-files", class: "button" }, t("import.choose")),
    input,
  );
  const text = h("textarea", { rows: 4, spellcheck: "false", autocomplete: "off", id: "import-text" });
  const paste = h("button", { type: "button", class: "primary", on: { click: () => send([{ name: "pasted.json", content: text.value }]) } }, t("import.paste.go"));
  const results = h("ul", { class: "results", "aria-live": "polite" });
  const element = h(
    "div",
    { class: "import-panel" },
    h("p", {}, t("import.intro")),
    zone,
    h("div", { class: "field wide" }, h("label", { for: "import-text" }, t("import.paste")), text),
    h("div", { class: "row" }, paste),
    error.element,
    results,
  );

  async function take(files) {
    error.tell(null);
    const size = files.reduce((total, file) => total + file.size, 0);
    if (size > MOST_BYTES) {
      error.tell(new Error(t("import.large")));
      return;
    }
    await send(await Promise.all(files.map(async (file) => ({ name: file.name, content: await file.text() }))));
    input.value = "";
  }

  async function send(files) {
    error.tell(null);
    if (files.length === 0 || files.every((file) => file.content.trim() === "")) {
      error.tell(new Error(t("import.empty")));
      return;
    }
    paste.disabled = true;
    try {
      const found = (await post("/import", { files })).results;
      text.value = "";
      put(
        results,
        found.map((one) =>
          h(
            "li",
            { class: one.success ? "good" : "bad" },
            icon(one.success ? "ok" : "bad", 14),
            raw("strong", {}, one.alias ?? one.name),
            " ",
            raw("span", {}, one.message),
          ),
        ),
      );
      onDone(found.filter((one) => one.success).length);
    } catch (failure) {
      error.tell(failure);
    } finally {
      paste.disabled = false;
    }
  }

  return { element };
}

export function openLogin(onDone) {
  const panel = loginPanel(onDone);
  dialog(t("device.title"), panel.element, { onClose: panel.stop });
}

export function openImport(onDone) {
  dialog(t("import.title"), importPanel(onDone).element);
}

/** A round over all accounts, told as it goes on. */
export function openRound(title, run) {
  const news = h("p", { role: "status" }, t("round.running"));
  const bar = h("progress", { max: 1, "aria-label": title });
  const failed = h("ul", { class: "results" });
  const control = new AbortController();
  const box = dialog(title, h("div", {}, bar, news, failed), { onClose: () => control.abort() });
  run((name, data) => {
    if (name === "item") {
      bar.max = data.total;
      bar.value = data.current;
      say(news, t("round.at", { current: number(data.current), total: number(data.total) }));
      if (!data.success) failed.append(h("li", { class: "bad" }, icon("bad", 14), raw("strong", {}, data.alias), " ", raw("span", {}, data.reason ?? "")));
    } else if (name === "done") {
      bar.value = bar.max;
      say(news, t("round.done", { good: number(data.success_count), bad: number(data.failed_count) }));
    }
  }, control.signal).catch((failure) => {
    if (failure.name !== "AbortError") say(news, failureText(failure));
  });
  return box;
}
