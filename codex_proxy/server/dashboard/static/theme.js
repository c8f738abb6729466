// Runs before the first paint, so that nobody who works in the dark is flashed at.
"use strict";
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("codex-proxy.theme");
  } catch {
    // Storage is off: the system's choice holds.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
