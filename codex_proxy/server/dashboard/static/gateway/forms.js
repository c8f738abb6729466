// Forms in dialogs: fields with a name, a hint and a place for what is wrong with each.

import { h, mark, raw, say, show } from "../dom.js";
import { dialog, trouble } from "../parts.js";
import { t } from "../text.js";

// What the daemon takes for money.
const MONEY = "-?[0-9]{1,10}(\\.[0-9]{1,9})?";

let count = 0;

/** A field; *param* is what the daemon calls it. */
function field(param, label, control, { hint = "", value = () => control.value.trim() } = {}) {
  count += 1;
  const id = `field-${count}`;
  const wrong = h("span", { class: "wrong", id: `${id}-wrong`, hidden: true });
  control.id = id;
  mark(control, "aria-describedby", `${id}-wrong${hint === "" ? "" : ` ${id}-hint`}`);
  control.addEventListener("input", () => tell(""));
  function tell(text) {
    show(wrong, text !== "");
    say(wrong, text);
    mark(control, "aria-invalid", text === "" ? null : "true");
  }
  return {
    param,
    control,
    value,
    tell,
    element: h("div", { class: "form-field" }, h("label", { for: id }, label), control, hint !== "" && h("span", { class: "under", id: `${id}-hint` }, hint), wrong),
  };
}

export function textField(param, label, { value = "", hint = "", required = false, type = "text", placeholder = null, autocomplete = "off", most = null, disabled = false } = {}) {
  return field(param, label, h("input", { type, value, required, placeholder, autocomplete, disabled, maxlength: most, spellcheck: "false" }), { hint });
}

/** A sum of dollars, as a decimal text; null when it is empty. */
export function moneyField(param, label, { value = "", hint = "", required = false, placeholder = null } = {}) {
  const control = h("input", { type: "text", inputmode: "decimal", value: value ?? "", required, placeholder, autocomplete: "off", pattern: MONEY, title: t("form.money") });
  return field(param, label, control, { hint, value: () => (control.value.trim() === "" ? null : control.value.trim()) });
}

/** A number, a whole one unless *step* says otherwise; null when it is empty. */
export function numberField(param, label, { value = null, hint = "", required = false, least = 1, most = 1_000_000_000, step = 1, placeholder = null } = {}) {
  const control = h("input", { type: "number", inputmode: step === 1 ? "numeric" : "decimal", value: value ?? "", required, min: least, max: most, step, placeholder });
  return field(param, label, control, { hint, value: () => (control.value === "" ? null : Number(control.value)) });
}

export function selectField(param, label, options, { value = "", hint = "", required = false } = {}) {
  const control = h("select", { required }, options.map(([option, words, isRaw]) => h("option", { value: option, translate: isRaw ? "no" : null, selected: option === value }, words)));
  return field(param, label, control, { hint });
}

/** Yes or no. */
export function checkField(param, label, { value = false, hint = "" } = {}) {
  const control = h("input", { type: "checkbox", checked: value });
  const found = field(param, label, control, { hint, value: () => control.checked });
  found.element.classList.add("form-check");
  return found;
}

/** A moment of the reader's own clock, as the daemon takes it; null when it is empty. */
export function momentField(param, label, { value = null, hint = "" } = {}) {
  const shown = value === null ? "" : localText(value);
  const control = h("input", { type: "datetime-local", value: shown });
  // What was not touched stays to the second.
  const read = () => (control.value === shown ? value : control.value === "" ? null : new Date(control.value).toISOString());
  return field(param, label, control, { hint, value: read });
}

function localText(text) {
  const at = new Date(text);
  return new Date(at.getTime() - at.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}

/** Words with commas or spaces between them. */
export function listField(param, label, { value = [], hint = "", placeholder = null } = {}) {
  const control = h("input", { type: "text", value: value.join(", "), placeholder, autocomplete: "off", spellcheck: "false" });
  return field(param, label, control, { hint, value: () => control.value.split(/[\s,]+/).filter((one) => one !== "") });
}

/** Several of a set of words. */
export function choiceField(param, label, options, { value = [], hint = "" } = {}) {
  count += 1;
  const boxes = options.map((option) => h("input", { type: "checkbox", value: option, id: `choice-${count}-${option}`, checked: value.includes(option) }));
  const wrong = h("span", { class: "wrong", hidden: true });
  return {
    param,
    control: boxes[0],
    value: () => boxes.filter((box) => box.checked).map((box) => box.value),
    tell(text) {
      show(wrong, text !== "");
      say(wrong, text);
    },
    element: h(
      "fieldset",
      { class: "form-field" },
      h("legend", {}, label),
      h("div", { class: "form-choices" }, boxes.map((box) => h("span", {}, box, raw("label", { for: box.id }, box.value)))),
      hint !== "" && h("span", { class: "under" }, hint),
      wrong,
    ),
  };
}

/** Fields that stand together below a title, folded up unless *isOpen*; what they hold is one object, or with no *value* each its own. */
export function group(title, fields, { value = null, param = null, isOpen = false } = {}) {
  const element = h("details", { class: "form-group", open: isOpen }, h("summary", {}, title), h("div", { class: "form-grid" }, fields.map((one) => one.element)));
  // What is wrong has to be seen.
  element.addEventListener("invalid", () => (element.open = true), true);
  return {
    param,
    fields,
    value,
    control: fields[0].control,
    tell(text) {
      if (text !== "") element.open = true;
      fields[0].tell(text);
    },
    open: () => (element.open = true),
    element,
  };
}

/**
 * Show a form; *submit* is given the fields' values by their names and may fail, which the form then says.
 *
 * Resolves with what *submit* returned; null when it was closed.
 */
export function form({ title, intro = "", fields, verb, submit, isDangerous = false, wide = false }) {
  return new Promise((resolve) => {
    let found = null;
    const error = trouble();
    const go = h("button", { type: "submit", class: isDangerous ? "danger" : "primary" }, verb);
    const body = h(
      "form",
      { class: "form", on: { submit: send } },
      intro !== "" && h("p", { class: "muted" }, intro),
      fields.map((one) => one.element),
      error.element,
      h("div", { class: "dialog-actions" }, h("button", { type: "button", on: { click: () => box.close() } }, t("cancel")), go),
    );

    async function send(event) {
      event.preventDefault();
      if (go.disabled) return;
      go.disabled = true;
      error.tell(null);
      for (const one of fields.flatMap((found) => found.fields ?? [found])) one.tell("");
      try {
        found = await submit(Object.fromEntries(fields.flatMap((one) => (one.value === null ? one.fields : [one])).filter((one) => one.param !== null).map((one) => [one.param, one.value()])));
        box.close();
      } catch (failure) {
        error.tell(failure);
        blame(failure);
      }
      go.disabled = false;
    }

    /** Point at the field that the daemon did not like. */
    function blame(failure) {
      if (!failure.param) return;
      const all = fields.flatMap((one) => [...(one.fields ?? []), one]);
      const guilty = all.find((one) => one.param !== null && (failure.param === one.param || failure.param.startsWith(`${one.param}.`)));
      if (guilty === undefined) return;
      fields.find((one) => one.fields?.includes(guilty))?.open();
      guilty.tell(failure.message);
      guilty.control.focus();
    }

    const box = dialog(title, body, { wide, onClose: () => resolve(found) });
    (fields.find((one) => !one.control.disabled)?.control ?? go).focus();
  });
}
