// Elements without markup: text only ever becomes a text node, so nothing that the daemon tells can become a tag.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element. Props: `class`, `on` (listeners), `style` (through the CSSOM, which the policy allows), else attributes. */
export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** Make an SVG element. */
export function svg(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (name === "style") {
      for (const [property, text] of Object.entries(value)) element.style.setProperty(property, text);
    } else {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) append(element, child);
    else element.append(child instanceof Node ? child : String(child));
  }
}

/** Replace all children. */
export function put(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

/** Set an element's text if it differs: a page at rest touches nothing. */
export function say(element, text) {
  const wanted = text === null || text === undefined ? "" : String(text);
  if (element.textContent !== wanted) element.textContent = wanted;
  return element;
}

/** Set or remove an attribute if it differs. */
export function mark(element, name, value) {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else if (element.getAttribute(name) !== String(value)) {
    element.setAttribute(name, value === true ? "" : value);
  }
  return element;
}

/** Show or hide an element. */
export function show(element, isShown) {
  if (element.hidden === isShown) element.hidden = !isShown;
  return element;
}

/** A word of the daemon's: a name, an id, a sentence. It is shown as it is and not translated. */
export function raw(tag, props, ...children) {
  return h(tag, { translate: "no", ...props }, ...children);
}

/**
 * Keep the children of *parent* equal to a list, by key: what stays is patched, what moved is moved.
 *
 * *make* returns `{nodes, update(item)}`.
 */
export function keyed(parent, make) {
  const rows = new Map();
  return {
    rows,
    show(items, keyOf) {
      const seen = new Set();
      const focused = parent.contains(document.activeElement) ? document.activeElement : null;
      let cursor = parent.firstChild;
      for (const item of items) {
        const key = keyOf(item);
        seen.add(key);
        let row = rows.get(key);
        if (row === undefined) {
          row = make(item);
          rows.set(key, row);
        }
        row.update(item);
        for (const node of row.nodes) {
          if (node === cursor) cursor = cursor.nextSibling;
          else parent.insertBefore(node, cursor);
        }
      }
      for (const [key, row] of rows) {
        if (seen.has(key)) continue;
        for (const node of row.nodes) node.remove();
        rows.delete(key);
      }
      // A node that is moved loses the focus.
      if (focused !== null && focused.isConnected && document.activeElement !== focused) {
        focused.focus({ preventScroll: true });
      }
    },
  };
}

/** Call *job* once, *milliseconds* after the last call. */
export function debounced(job, milliseconds) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => job(...values), milliseconds);
  };
}
