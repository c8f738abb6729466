// Shapes: what a colour says, a shape says too.

import { svg } from "./dom.js";

const PATHS = {
  now: ["M3 12h4l3-8 4 16 3-8h4"],
  accounts: ["M9 11a3.5 3.5 0 1 0 0-7 3.5 3.5 0 0 0 0 7z", "M2.5 20a6.5 6.5 0 0 1 13 0", "M16 4.5a3.5 3.5 0 0 1 0 6.5", "M18 14.5a6.5 6.5 0 0 1 3.5 5.5"],
  horizon: ["M3 6h11M3 12h17M3 18h7", "M14 3.5v5M20 9.5v5M10 15.5v5"],
  requests: ["M4 6h16M4 12h16M4 18h10"],
  cache: ["M4 6.5C4 5 7.6 4 12 4s8 1 8 2.5S16.4 9 12 9 4 8 4 6.5z", "M4 6.5v11C4 19 7.6 20 12 20s8-1 8-2.5v-11", "M4 12c0 1.5 3.6 2.5 8 2.5s8-1 8-2.5"],
  gateway: ["M12 3l8 3v6c0 4.5-3.4 7.8-8 9-4.6-1.2-8-4.5-8-9V6z", "M9 12h6M12 9v6"],
  own: ["M3 12h4l3-8 4 16 3-8h4"],
  connect: ["M4 5h16v14H4z", "M8 10l2.5 2.5L8 15M13 15h4"],
  setup: ["M4 5h16v14H4z", "M8 10l2.5 2.5L8 15M13 15h4"],
  ok: ["M5 12.5l4.5 4.5L19 7.5"],
  warn: ["M12 4L2.8 20h18.4z", "M12 10v4.5M12 17.2v.3"],
  bad: ["M6 6l12 12M18 6L6 18"],
  info: ["M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18z", "M12 11v5.5M12 7.7v.3"],
  gone: ["M14 5l6 7-6 7", "M4 12h16"],
  cut: ["M5 12h14"],
  wait: ["M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18z", "M12 7.5V12l3 2"],
  copy: ["M9 9h11v11H9z", "M15 9V4H4v11h5"],
  sun: ["M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8z", "M12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4"],
  moon: ["M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z"],
  screen: ["M3 4.5h18v12H3zM8.5 20.5h7M12 16.5v4"],
  leave: ["M14 4H5v16h9M10 12h11M17.5 8l4 4-4 4"],
  plus: ["M12 5v14M5 12h14"],
  back: ["M15 5l-7 7 7 7"],
  play: ["M8 5l11 7-11 7z"],
  pause: ["M8 5v14M16 5v14"],
  chevron: ["M9 6l6 6-6 6"],
  bell: ["M6 16.5V11a6 6 0 0 1 12 0v5.5l1.5 2h-15z", "M10 21h4"],
};

/** A picture that says nothing by itself: the words beside it do. */
export function icon(name, size = 16) {
  return svg(
    "svg",
    { class: `icon icon-${name}`, viewBox: "0 0 24 24", width: size, height: size, "aria-hidden": "true", focusable: "false" },
    ...(PATHS[name] ?? []).map((d) => svg("path", { d })),
  );
}

/** The mark of an account's state: each has a shape of its own. */
export function stateMark(status) {
  const shapes = {
    active: () => svg("circle", { cx: 6, cy: 6, r: 5 }),
    cooldown: () => [
      svg("circle", { cx: 6, cy: 6, r: 4.2, class: "hollow" }),
      svg("path", { d: "M6 1.8a4.2 4.2 0 0 1 0 8.4z" }),
    ],
    unavailable: () => svg("path", { d: "M6 .8L11.6 11H.4z" }),
    needs_login: () => svg("path", { d: "M6 .4L11.6 6 6 11.6.4 6z" }),
    disabled: () => [
      svg("circle", { cx: 6, cy: 6, r: 4.2, class: "hollow" }),
      svg("path", { d: "M3 9L9 3", class: "hollow" }),
    ],
  };
  const shape = (shapes[status] ?? shapes.disabled)();
  return svg(
    "svg",
    { class: `mark mark-${status}`, viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true", focusable: "false" },
    ...[shape].flat(),
  );
}
