// What moves on the page of attention.py: words shaded by weight, sliders over layer, head and side, shares and heads.

const pick = (id) => document.getElementById(id);
const chosen = (id) => Number(pick(id)?.value ?? 0);
const withoutBos = () => pick("without-bos").checked;
const colourOf = (category) => data.categories[category].colour;
const nameOf = (category) => data.categories[category].name;
const scaleOf = (colours) => colours.map((colour, i) => [i / (colours.length - 1), colour]);
const symbols = {
  bos: "circle", prefix: "triangle-down", suffix: "triangle-up", content: "square", function: "diamond", punctuation: "cross", eos: "x", text: "star",
};
const plain = { ...plotlyConfig, responsive: false };

const percent = (share) => `${(100 * share).toFixed(2)} %`;

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

// the colour of the shades at a place from 0 to 1
function shade(place) {
  const colours = data.shades.map((code) => [1, 3, 5].map((i) => parseInt(code.slice(i, i + 2), 16)));
  const at = Math.min(Math.max(place, 0), 1) * (colours.length - 1);
  const i = Math.min(Math.floor(at), colours.length - 2);
  return colours[i].map((value, k) => Math.round(value + (at - i) * (colours[i + 1][k] - value)));
}

// ----------------------------------------------------------------------------------------------------------------- texts

let text, weights; // the text that is shown, and its weights (sides, layers, heads, tokens) in one array

// weights of 16-bit square roots
function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  return Float32Array.from(new Uint16Array(bytes.buffer), (root) => (root / 65535) ** 2);
}

// the others divided by their sum, where BOS is not to count
function leaveOutBos(row) {
  const others = row.map((weight, i) => (text.categories[i] === "bos" ? 0 : weight));
  const total = others.reduce((a, b) => a + b, 0);
  return total > 0 ? others.map((weight) => weight / total) : others;
}

// the weight of every token; layer 0 is the mean over layers, head 0 the mean over heads
function look(side, layer, head) {
  const n = text.pieces.length;
  const mean = (rows) => rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);
  const numbered = (number, most) => (number ? [number - 1] : [...Array(most).keys()]);
  const ofLayer = (l) => {
    const rows = numbered(head, text.heads).map((h) => Array.from(weights.subarray(((side * data.layers + l) * text.heads + h) * n).subarray(0, n)));
    const row = mean(rows);
    return withoutBos() ? leaveOutBos(row) : row;
  };
  return mean(numbered(layer, data.layers).map(ofLayer));
}

const sum = (row, start, stop) => row.slice(start, stop).reduce((a, b) => a + b, 0);

function shareOf(row, category) {
  return row.reduce((total, weight, i) => total + (text.categories[i] === category ? weight : 0), 0);
}

const shownSides = () => (data.sides.length > 1 ? [0, chosen("side")] : [0]);

// the words of both sides as elements, without their shades
function writeWords() {
  const blocks = shownSides().map(() => {
    const block = element("div", "", "words");
    block.dir = "auto";
    for (const [number, [, , gap, category, shown]] of text.words.entries()) {
      const word = element("span", shown);
      word.dataset.word = number;
      word.style.borderBottomColor = colourOf(category);
      block.append(gap, word);
    }
    block.onscroll = () => blocks.forEach((other) => (other.scrollTop = block.scrollTop));
    return block;
  });
  pick("looks").replaceChildren(...blocks.flatMap((block) => [element("h3"), block]));
}

function shadeWords() {
  const rows = shownSides().map((side) => look(side, chosen("layer"), chosen("head")));
  const ofWords = rows.map((row) => text.words.map(([start, stop]) => sum(row, start, stop)));
  const counts = text.words.map(([start]) => text.categories[start] !== "bos" && !text.folded[start]);
  const top = Math.max(...ofWords.flatMap((values) => values.filter((_, i) => counts[i])), 1e-9);
  [...pick("looks").querySelectorAll(".words")].forEach((block, k) => {
    block.previousSibling.textContent = data.sides[shownSides()[k]];
    block.querySelectorAll("span").forEach((word, i) => {
      const [red, green, blue] = text.folded[text.words[i][0]] ? [255, 255, 255] : shade(Math.sqrt(ofWords[k][i] / top));
      word.style.backgroundColor = `rgb(${red}, ${green}, ${blue})`;
      word.style.color = 0.3 * red + 0.59 * green + 0.11 * blue < 140 ? "#fff" : "#1b1f24";
    });
  });
  writeScale(top);
  pick("looks").onmousemove = (event) => tell(event, rows, ofWords);
  pick("looks").onmouseleave = () => tell({ target: pick("looks") }, rows, ofWords);
}

function writeScale(top) {
  const ramp = element("span", "", "ramp");
  const stops = [0, 0.2, 0.4, 0.6, 0.8, 1].map((place) => `rgb(${shade(place).join()})`);
  ramp.style.background = `linear-gradient(90deg, ${stops.join()})`;
  const keys = Object.keys(data.categories).filter((category) => text.categories.includes(category));
  const legend = keys.map((category) => {
    const line = element("span", "");
    const sign = element("span", "", "key");
    sign.style.background = colourOf(category);
    line.append(sign, nameOf(category));
    return line;
  });
  pick("scale").replaceChildren(element("span", "weight of a word: 0 %"), ramp, element("span", percent(top)), ...legend);
}

// the numbers of the word under the pointer, for both sides
function tell(event, rows, ofWords) {
  const tip = pick("tip");
  const number = event.target.dataset?.word;
  document.querySelectorAll(".words .marked").forEach((word) => word.classList.remove("marked"));
  tip.hidden = number === undefined;
  if (tip.hidden) return;
  document.querySelectorAll(`.words [data-word="${number}"]`).forEach((word) => word.classList.add("marked"));
  const [start, stop, , category, shown] = text.words[number];
  const lines = [`\u2068${shown}\u2069: ${nameOf(category)}`];
  shownSides().forEach((side, k) => lines.push(`${data.sides[side]}: ${percent(ofWords[k][number])}`));
  const most = 8;
  for (let i = start; stop - start > 1 && i < Math.min(stop, start + most); i++)
    lines.push(`   token \u2068${text.pieces[i] || "·"}\u2069: ${rows.map((row) => percent(row[i])).join(", ")}`);
  if (stop - start > most) lines.push(`   and ${stop - start - most} more tokens`);
  tip.replaceChildren(...lines.map((line) => element("div", line)));
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${event.clientY + 20 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 20}px`;
}

function drawTextShares() {
  const rows = data.sides.map((_, side) => look(side, chosen("layer"), chosen("head")));
  const categories = Object.keys(data.categories).filter((category) => text.categories.includes(category) && !(withoutBos() && category === "bos"));
  const traces = categories.map((category) => ({
    type: "bar",
    orientation: "h",
    name: nameOf(category),
    y: data.sides.map((name) => labelText(name)),
    x: rows.map((row) => 100 * shareOf(row, category)),
    marker: { color: colourOf(category) },
    text: rows.map((row) => 100 * shareOf(row, category)).map((share) => (share < 2.5 ? "" : share.toFixed(1))),
    texttemplate: "%{text}",
    textposition: "inside",
    insidetextanchor: "middle",
    textangle: 0,
    hovertemplate: `${nameOf(category)}: %{x:.2f} %<extra></extra>`,
  }));
  const layout = {
    barmode: "stack", height: 110 + 30 * data.sides.length, width: 1190, margin: { l: 20, r: 20, t: 10, b: 30 }, font: ordinaryFont,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", traceorder: "normal" }, xaxis: { range: [0, 100], ticksuffix: " %" },
    yaxis: { autorange: "reversed", automargin: true, ticksuffix: "  ", type: "category" },
  };
  return Plotly.react("shares", traces, layout, plain);
}

function drawTextHeads() {
  const own = text.categories.includes("content") ? ["content"] : ["function", "punctuation"];
  const grids = shownSides().map((side) =>
    [...Array(data.layers).keys()].map((l) =>
      [...Array(text.heads).keys()].map((h) => {
        const row = look(side, l + 1, h + 1);
        return 100 * own.reduce((total, category) => total + shareOf(row, category), 0);
      }),
    ),
  );
  return drawGrids("heads", grids, shownSides().map((side) => data.sides[side]), "head");
}

// grids (layers, heads or categories) beside each other on one scale
function drawGrids(id, grids, names, across, { columns = null, shown = null, signed = -1 } = {}) {
  const n = columns?.length ?? grids[0][0].length;
  const top = Math.max(...grids.filter((_, i) => i !== signed).flat(2).map((v) => v ?? 0), 1e-6);
  const most = signed < 0 ? 1 : Math.max(...grids[signed].flat().map((v) => Math.abs(v ?? 0)), 1e-6);
  const wide = Math.min(560, 170 + 46 * n) * grids.length;
  const traces = grids.map((values, i) => ({
    type: "heatmap", z: values, x: columns ?? values[0].map((_, k) => k + 1), y: values.map((_, k) => k + 1),
    xaxis: i ? `x${i + 1}` : "x", yaxis: i ? `y${i + 1}` : "y", showscale: false, xgap: 1, ygap: 1,
    zmin: i === signed ? -most : 0, zmax: i === signed ? most : top,
    colorscale: scaleOf(i === signed ? data.differences : data.shades),
    text: shown?.[i] ?? values.map((row) => row.map((v) => `${v.toFixed(1)} %`)),
    texttemplate: values.length * n <= 320 ? "%{z:.1f}" : undefined,
    hovertemplate: `layer %{y}, ${columns ? "%{x}" : `${across} %{x}`}<br>%{text}<extra></extra>`,
  }));
  const layout = {
    height: (columns ? 180 : 110) + Math.min(640, 32 * data.layers), width: Math.min(1190, wide), margin: { l: 44, r: 10, t: 30, b: columns ? 110 : 40 }, font: ordinaryFont, annotations: [],
  };
  grids.forEach((_, i) => {
    const number = i ? i + 1 : "";
    const part = 1 / grids.length;
    const axis = { showgrid: false, zeroline: false };
    layout[`xaxis${number}`] = { ...axis, domain: [i * part, (i + 0.9) * part], anchor: `y${number}`, title: { text: columns ? "" : across }, type: columns ? "category" : "linear", tickangle: columns ? -40 : 0, ...(columns ? {} : { dtick: Math.ceil(n / 16) }) };
    layout[`yaxis${number}`] = { ...axis, anchor: `x${number}`, title: { text: i ? "" : "layer" }, dtick: Math.ceil(data.layers / 16) };
    layout.annotations.push({ text: labelText(names[i]), showarrow: false, xref: `x${number} domain`, x: 0, xanchor: "left", yref: "paper", y: 1, yanchor: "bottom" });
  });
  return Plotly.react(id, traces, layout, plain);
}

async function showText() {
  text = data.texts[chosen("text")];
  weights = unpack(text.weights);
  pick("note").textContent = text.note;
  const head = pick("head");
  head.max = text.heads > 1 ? text.heads : 0;
  head.disabled = text.heads < 2;
  writeWords();
  await refreshText();
  await drawTextHeads();
}

function refreshText() {
  writeValues();
  shadeWords();
  return drawTextShares();
}

async function startTexts() {
  pick("text").replaceChildren(...data.texts.map((item, i) => new Option(`${i + 1}: ${item.title}`, i)));
  document.body.append(Object.assign(element("div"), { id: "tip", hidden: true }));
  pick("head").value = 0;
  pick("text").onchange = showText;
  for (const id of ["layer", "head"]) pick(id).oninput = refreshText;
  if (pick("side"))
    pick("side").oninput = () => {
      refreshText();
      drawTextHeads();
    };
  pick("without-bos").onchange = () => {
    refreshText();
    drawTextHeads();
  };
  if (!data.texts.length) return;
  await showText();
  pick("heads").on("plotly_click", ({ points: [point] }) => {
    pick("layer").value = point.y;
    pick("head").value = point.x;
    if (pick("side") && point.curveNumber) pick("side").value = shownSides()[1];
    refreshText();
  });
}

// what the sliders stand at
function writeValues() {
  const said = {
    layer: (n) => (n ? `${n} of ${data.layers}` : "mean over layers"),
    head: (n) => (text.heads < 2 || !n ? "mean over heads" : `${n} of ${text.heads}`),
    side: (n) => data.sides[n],
  };
  for (const [id, say] of Object.entries(said)) {
    const output = pick(id)?.parentElement.querySelector("output");
    if (output) output.textContent = say(chosen(id));
  }
}

// ---------------------------------------------------------------------------------------------------------------- corpus

const interval = ([mean, low, high], unit) => `${mean.toFixed(1)} ${unit} (${low.toFixed(1)} to ${high.toFixed(1)})`;

function drawCurves() {
  const bos = String(!withoutBos());
  const traces = data.shown[bos].map((category, c) => {
    const cells = data.sides.map((_, side) => data.shares[bos][side][chosen("layer")][c]);
    const of = (pickOne) => cells.map((found) => found && pickOne(found));
    return {
      type: "scatter", mode: "lines+markers", name: nameOf(category), x: data.sides.map((name) => labelText(name)), y: of((f) => f[0]),
      error_y: { type: "data", symmetric: false, array: of((f) => f[2] - f[0]), arrayminus: of((f) => f[0] - f[1]), thickness: 1.2, width: 4 },
      line: { color: colourOf(category), width: 2.5 }, marker: { size: 9, symbol: symbols[category] },
      text: of((f) => interval(f, "%")), hovertemplate: `${nameOf(category)}, %{x}: %{text}<extra></extra>`,
    };
  });
  const layout = {
    height: 460, width: 1190, margin: { l: 60, r: 20, t: 20, b: 40 }, font: ordinaryFont, hovermode: "closest",
    yaxis: { rangemode: "tozero", ticksuffix: " %", zeroline: false }, xaxis: { type: "category" }, legend: { orientation: "h", y: -0.12 },
  };
  return Plotly.react("shares", traces, layout, plain);
}

function drawCorpusLayers() {
  const bos = String(!withoutBos());
  const side = data.sides.length > 1 ? chosen("side") : 0;
  const kept = data.shown[bos].map((category) => category !== "text");
  const columns = data.shown[bos].filter((_, c) => kept[c]).map((category) => data.categories[category].short);
  const tables = [data.shares[bos][side].slice(1)];
  const names = [data.sides[side]];
  if (side) {
    tables.push(data.less[bos][side].slice(1));
    names.push(`${data.sides[side]} less ${data.sides[0]}`);
  }
  const own = tables.map((table) => table.map((row) => row.filter((_, c) => kept[c])));
  const grids = own.map((table) => table.map((row) => row.map((found) => found && found[0])));
  const shown = own.map((table, i) => table.map((row) => row.map((found) => (found ? interval(found, i ? "points" : "%") : ""))));
  return drawGrids("layers", grids, names, "", { columns, shown, signed: side ? 1 : -1 });
}

function refreshCorpus() {
  writeValues();
  const side = data.sides.length > 1 ? chosen("side") : 0;
  const sides = side ? [0, side] : [0];
  const heads = sides.map((s) => data.heads[s].map((row) => row.map((share) => 100 * share)));
  return Promise.all([drawCurves(), drawCorpusLayers(), drawGrids("heads", heads, sides.map((s) => data.sides[s]), "head")]);
}

async function startCorpus() {
  for (const id of ["layer", "side", "without-bos"]) if (pick(id)) pick(id).oninput = refreshCorpus;
  await refreshCorpus();
}

(data.kind === "texts" ? startTexts() : startCorpus()).then(() => (document.body.dataset.drawn = data.kind));
