"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const plotlyConfig = { displaylogo: false, responsive: true, showSendToCloud: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
const ordinaryFont = { family: "system-ui, sans-serif", size: 13, color: "#1b1f24" };

// an array of numbers from plotly's {dtype, bdata}
function numbers(spec) {
  const bytes = Uint8Array.from(atob(spec.bdata), (c) => c.charCodeAt(0));
  return new { f4: Float32Array, i4: Int32Array }[spec.dtype](bytes.buffer);
}

// plotly takes some tags in its labels for markup: text of users has none. Lines of about `width` characters, each isolated, so that
// what is written from right to left stays in its line.
function labelText(text, width = 60) {
  const lines = [];
  let line = "";
  for (let word of text.split(" ")) {
    for (; word.length > width; word = word.slice(width)) {
      lines.push(line, word.slice(0, width));
      line = "";
    }
    if (line.length + word.length > width) {
      lines.push(line);
      line = "";
    }
    line += (line && " ") + word;
  }
  const escaped = [...lines, line].filter(Boolean).map((l) => l.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"));
  return escaped.map((l) => `\u2068${l}\u2069`).join("<br>");
}

// whether many points can be drawn by WebGL; else they are drawn as SVG, which is slower
function hasWebGL() {
  const canvas = document.createElement("canvas");
  return Boolean(canvas.getContext("webgl"));
}
