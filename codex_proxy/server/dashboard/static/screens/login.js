// The door: a key, where one is needed.

import { signIn } from "../api.js";
import { h, put, say, show } from "../dom.js";
import { icon } from "../icons.js";
import { failureText } from "../parts.js";
import { LANGUAGES, coarse, currentLanguage, t } from "../text.js";

export function loginScreen({ notice, language, done }) {
  const field = h("input", {
    type: "password", id: "key", name: "key", autocomplete: "current-password", required: true, spellcheck: "false", "aria-describedby": "key-help key-error",
  });
  const button = h("button", { type: "submit", class: "primary" }, t("login.enter"));
  const error = h("p", { class: "trouble", id: "key-error", role: "alert", hidden: notice === "" }, notice === "" ? null : [icon("info"), h("span", {}, notice)]);
  let timer = 0;

  function refuse(text) {
    show(error, true);
    put(error, icon("warn"), h("span", {}, text));
  }

  /** Count down until another try is allowed. */
  function wait(seconds) {
    const end = Date.now() / 1000 + seconds;
    button.disabled = true;
    refuse(t("login.throttled"));
    const tick = () => {
      const left = end - Date.now() / 1000;
      if (left <= 0 || !button.isConnected) {
        clearInterval(timer);
        button.disabled = false;
        say(button, t("login.enter"));
        show(error, false);
        return;
      }
      say(button, t("login.wait", { span: coarse(Math.ceil(left)) }));
    };
    timer = setInterval(tick, 500);
    tick();
  }

  const form = h(
    "form",
    {
      on: {
        submit: async (event) => {
          event.preventDefault();
          if (button.disabled) return;
          button.disabled = true;
          try {
            const found = await signIn(field.value.trim());
            field.value = "";
            done(found);
          } catch (failure) {
            button.disabled = false;
            if (failure.status === 429) wait(failure.retryAfter ?? 5);
            else refuse(failure.status === 401 ? t("login.wrong") : failureText(failure));
            field.select();
          }
        },
      },
    },
    h("label", { for: "key" }, t("login.key")),
    field,
    h("div", { class: "muted", id: "key-help" }, h("p", {}, t("login.key.help")), h("p", {}, t("login.token.help"))),
    error,
    button,
  );
  return h(
    "main",
    { class: "center" },
    h(
      "div",
      { class: "door" },
      h("p", { class: "brand", translate: "no" }, "codex-proxy"),
      h("h1", {}, t("login.title")),
      form,
      h(
        "select",
        { id: "language", "aria-label": t("language"), on: { change: (event) => language.change(event.target.value) } },
        ...LANGUAGES.map(([code, name]) => h("option", { value: code, lang: code, translate: "no", selected: code === currentLanguage() }, name)),
      ),
    ),
  );
}
