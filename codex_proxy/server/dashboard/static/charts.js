// Charts by uPlot, which is loaded when the first one is drawn; colours are those of the page's theme.

import { h, mark, put, svg } from "./dom.js";
import { clock, hour, short, weekday } from "./text.js";

let loading = null;

function load() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "/ui/static/vendor/uPlot.iife.min.js";
    script.addEventListener("load", () => resolve(globalThis.uPlot));
    script.addEventListener("error", () => {
      loading = null;
      reject(new Error(script.src));
    });
    document.head.append(script);
  });
  return loading;
}

// From a minute to a month: less than what their labels tell apart says nothing.
const STEPS = [1, 5, 15, 30, 60, 120, 180, 360, 720, 1440, 2880, 10080, 43200].map((minutes) => minutes * 60);

// Told apart by their dashes too.
const DASHES = [[], [6, 4], [2, 3]];

/**
 * Make a chart of lines over time.
 *
 * *lines* are `{name, color, fill, format}` with color a variable of the style sheet; `update(rows)` takes
 * `[at, value, ...]` rows, null for what is unknown.
 * Without *hasLatest* a value is told only under the pointer; *bars* stand for what was summed over a time, a day each where *days* says so.
 */
export function chart({ title, hint = "", lines, format = short, height = 150, seconds = false, hasLatest = true, bars = false, days = false }) {
  const canvas = h("div", { class: "plot", role: "img", "aria-label": title });
  const latest = lines.map(() => h("b", {}));
  const legend = h(
    "div",
    { class: "legend" },
    lines.map((line, place) =>
      h("span", {}, swatch(line.color, place, line.fill, bars), h("span", {}, line.name), " ", latest[place]),
    ),
  );
  const element = h(
    "figure",
    { class: "chart" },
    h("figcaption", {}, h("span", { class: "chart-title" }, title), hint && h("span", { class: "muted" }, hint), legend),
    canvas,
  );
  let plot = null;
  let data = [[], ...lines.map(() => [])];
  let isGone = false;

  const size = () => ({ width: Math.max(120, canvas.clientWidth), height });
  const observer = new ResizeObserver(() => plot?.setSize(size()));
  observer.observe(canvas);

  load().then(
    (Plot) => {
      if (isGone) return;
      const style = getComputedStyle(document.documentElement);
      const colour = (name) => style.getPropertyValue(name).trim();
      const axis = {
        stroke: colour("--muted"), font: "11px system-ui, sans-serif",
        grid: { stroke: colour("--grid"), width: 1 }, ticks: { show: false },
      };
      plot = new Plot(
        {
          ...size(),
          legend: { show: false },
          cursor: { y: false, points: { size: 6 }, drag: { x: false, y: false } },
          padding: [8, 8, 0, 0],
          // What was summed by days of UTC stands at their beginnings, wherever the reader is.
          ...(days ? { tzDate: (at) => Plot.tzDate(new Date(at * 1000), "Etc/UTC") } : {}),
          scales: { x: { time: true, range: spread }, y: { range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1] } },
          axes: [
            { ...axis, space: 64, size: 26, ...(seconds ? {} : { incrs: STEPS }), values: (_, marks) => (days ? marks.map((at) => weekday(at, "UTC")) : labels(marks, seconds)) },
            { ...axis, size: 52, space: 36, values: (_, marks) => marks.map((value) => format(value)) },
          ],
          series: [
            {},
            ...lines.map((line, place) => ({
              label: line.name, stroke: colour(line.color), width: 1.5, dash: DASHES[place % DASHES.length],
              fill: line.fill ? `color-mix(in srgb, ${colour(line.color)} 16%, transparent)` : undefined,
              points: { show: false }, spanGaps: false,
              ...(bars ? { width: 0, dash: [], fill: colour(line.color), paths: Plot.paths.bars({ size: place === 0 ? [0.8, 60] : [0.4, 30] }) } : {}),
            })),
          ],
          hooks: { setCursor: [(self) => tell(self.cursor.idx)] },
        },
        data,
        canvas,
      );
    },
    () => put(canvas, title),
  );

  // What stands under the pointer, else the last.
  function tell(place) {
    const at = place ?? (hasLatest ? data[0].length - 1 : -1);
    lines.forEach((line, number) => {
      const value = data[number + 1][at];
      const text = value === undefined ? "" : (line.format ?? format)(value);
      if (latest[number].textContent !== text) latest[number].textContent = text;
    });
  }

  return {
    element,
    update(rows) {
      data = [rows.map((row) => row[0]), ...lines.map((_, place) => rows.map((row) => row[place + 1] ?? null))];
      plot?.setData(data);
      tell(plot?.cursor.idx ?? null);
      mark(canvas, "aria-label", `${title}: ${lines.map((line, place) => `${line.name} ${latest[place].textContent}`).join(", ")}`);
    },
    stop() {
      isGone = true;
      observer.disconnect();
      plot?.destroy();
    },
  };
}

/** Say what moments are, without saying the same twice. */
function labels(marks, seconds) {
  if (seconds) return marks.map(clock);
  const isDays = marks.length > 1 && marks[1] - marks[0] >= 86400;
  return marks.map((at) => (isDays ? weekday(at) : hour(at)));
}

/** Leave room for the first and the last bar, and some where there is a single moment only. */
function spread(plot) {
  const places = plot.data[0];
  if (places.length === 0) return [null, null];
  const [low, high] = [places[0], places.at(-1)];
  const step = places.length > 1 ? places[1] - low : 60;
  return low === high || plot.series[1].width === 0 ? [low - step / 2, high + step / 2] : [low, high];
}

function swatch(color, place, isFilled, isBar) {
  if (isBar) {
    const box = { x: 4, y: place === 0 ? 1 : 3, width: 14, height: place === 0 ? 8 : 4, fill: "currentColor", stroke: "none" };
    return svg("svg", { class: "swatch", width: 22, height: 10, viewBox: "0 0 22 10", "aria-hidden": "true", focusable: "false", style: { color: `var(${color})` } }, svg("rect", box));
  }
  const dash = DASHES[place % DASHES.length].join(" ");
  return svg(
    "svg",
    { class: "swatch", width: 22, height: 10, viewBox: "0 0 22 10", "aria-hidden": "true", focusable: "false", style: { color: `var(${color})` } },
    isFilled && svg("rect", { x: 0, y: 5, width: 22, height: 5, class: "swatch-fill" }),
    svg("line", { x1: 0, y1: 5, x2: 22, y2: 5, "stroke-dasharray": dash === "" ? null : dash }),
  );
}
