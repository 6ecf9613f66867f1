// The pictures of evaluate.py --report: the heat map of a grid, and the maps of texts.

const colours = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#4b4b4b"]; // Okabe and Ito's, told apart by all
const shapes = ["circle", "diamond", "square", "triangle-up", "cross"];
const shapeSigns = ["●", "◆", "■", "▲", "✚"];
const legendMost = 35; // more classes than that have no colour and shape of their own
const gl = hasWebGL();

function drawGrid(grid) {
  const names = Object.keys(grid.values);
  const width = Math.min(1190, 330 + 110 * grid.columns.length);
  const every = names.flatMap((name) => grid.values[name].flat()).filter((value) => value !== null);
  const trace = {
    type: "heatmap",
    x: grid.columns.map((name) => labelText(name, 16)),
    y: grid.rows.map((name) => labelText(name)),
    z: grid.values[names[0]],
    text: grid.shown[names[0]],
    texttemplate: "%{text}",
    hovertemplate: "%{y}<br>%{x}<br>%{text}<extra></extra>",
    colorscale: [[0, "#f1f5f9"], [0.5, "#8db8d8"], [1, "#0b4f8a"]],
    colorbar: { title: { text: grid.metric + " × 100" }, thickness: 14 },
    xgap: 2,
    ygap: 2,
  };
  const layout = {
    width,
    height: 130 + 34 * grid.rows.length,
    margin: { l: 20, r: 20, t: names.length > 1 ? 60 : 20, b: 20 },
    font: ordinaryFont,
    xaxis: { type: "category", automargin: true, showgrid: false, ticks: "", ...(grid.columns.length > 8 ? {} : { tickangle: 0 }) },
    yaxis: { type: "category", automargin: true, autorange: "reversed", showgrid: false, ticks: "" },
    plot_bgcolor: "#fff",
  };
  if (names.length > 1)
    layout.updatemenus = [
      {
        x: 0, xanchor: "left", y: 1, yanchor: "bottom", pad: { b: 10 },
        buttons: names.map((name) => ({ label: labelText(name), method: "restyle", args: [{ z: [grid.values[name]], text: [grid.shown[name]] }] })),
      },
    ];
  return Plotly.newPlot("grid", [trace], layout, { ...plotlyConfig, responsive: false });
}

// colour, shape, size and opacity of every point; `chosen` is a class or -1 for all
function look(codes, chosen) {
  const code = Array.from(codes);
  const small = code.length > 5000 ? 4 : code.length > 1000 ? 5 : 7;
  if (chosen < 0)
    return {
      color: code.map((c) => colours[c % colours.length]),
      symbol: code.map((c) => shapes[Math.floor(c / colours.length) % shapes.length]),
      size: small,
      opacity: 0.75,
    };
  return {
    color: code.map((c) => (c === chosen ? "#d55e00" : "#9aa4af")),
    symbol: "circle",
    size: code.map((c) => (c === chosen ? small + 3 : small)),
    opacity: code.map((c) => (c === chosen ? 1 : 0.25)),
  };
}

function mapLayout(map) {
  const n = map.panels.length;
  const axis = { showgrid: false, zeroline: false, showticklabels: false, ticks: "", showline: true, mirror: true, linecolor: "#c5ccd3" };
  const layout = {
    height: n > 1 ? 620 : 700,
    margin: { l: 6, r: 6, t: 56, b: 6 },
    font: ordinaryFont,
    showlegend: false,
    hovermode: "closest",
    dragmode: "pan",
    hoverlabel: { align: "left", bgcolor: "#fff", font: { color: "#1b1f24", size: 13 } },
    annotations: [],
  };
  map.panels.forEach((panel, i) => {
    const number = i ? i + 1 : "";
    layout[`xaxis${number}`] = { ...axis, domain: n > 1 ? [0.505 * i, 0.495 + 0.505 * i] : [0, 1], anchor: `y${number}` };
    layout[`yaxis${number}`] = { ...axis, anchor: `x${number}`, scaleanchor: `x${number}`, scaleratio: 1 };
    const title = { text: labelText(panel.title, 70), showarrow: false, font: { size: 14 } };
    layout.annotations.push({ ...title, xref: `x${number} domain`, x: 0, xanchor: "left", yref: "paper", y: 1.005, yanchor: "bottom", align: "left" });
  });
  return layout;
}

async function drawMap(map) {
  const place = document.getElementById("map");
  const codes = numbers(map.codes);
  const texts = map.texts.map((text) => labelText(text));
  const names = map.names.map((name) => labelText(name));
  const classes = Array.from(codes, (c) => names[c]);
  const traces = map.panels.map((panel, i) => ({
    type: gl ? "scattergl" : "scatter",
    mode: "markers",
    x: panel.x,
    y: panel.y,
    xaxis: i ? "x2" : "x",
    yaxis: i ? "y2" : "y",
    text: texts,
    customdata: classes,
    hovertemplate: "%{text}<br><b>%{customdata}</b><extra></extra>",
    marker: look(codes, -1),
  }));
  document.getElementById("map-note").textContent = map.note;
  await Plotly.react(place, traces, mapLayout(map), { ...plotlyConfig, scrollZoom: true });
  place.removeAllListeners("plotly_hover");
  place.removeAllListeners("plotly_unhover");
  place.on("plotly_hover", (event) => ringElsewhere(map, event.points[0]));
  place.on("plotly_unhover", () => Plotly.relayout(place, { shapes: [] }));
  offerClasses(map, codes);
}

// a ring around the text that is pointed at, on the other side
function ringElsewhere(map, point) {
  const ring = { type: "circle", xsizemode: "pixel", ysizemode: "pixel", x0: -10, x1: 10, y0: -10, y1: 10, line: { color: "#000", width: 2.5 } };
  const shapes = map.panels.flatMap((panel, i) => {
    const axes = { xref: i ? "x2" : "x", yref: i ? "y2" : "y" };
    const at = { xanchor: numbers(panel.x)[point.pointNumber], yanchor: numbers(panel.y)[point.pointNumber] };
    return i === point.curveNumber ? [] : [{ ...ring, ...axes, ...at }];
  });
  Plotly.relayout("map", { shapes });
}

function offerClasses(map, codes) {
  const choice = document.getElementById("class");
  choice.replaceChildren(new Option(`all ${map.names.length} ${map.kind}s`, -1), ...map.names.map((name, i) => new Option(name, i)));
  choice.onchange = () => {
    const marker = look(codes, Number(choice.value));
    const wrap = (values) => map.panels.map(() => values);
    Plotly.restyle("map", {
      "marker.color": wrap(marker.color), "marker.symbol": wrap(marker.symbol),
      "marker.size": wrap(marker.size), "marker.opacity": wrap(marker.opacity),
    });
  };
  const legend = document.getElementById("legend");
  legend.replaceChildren(...(map.names.length > legendMost ? [] : map.names.map((name, i) => legendEntry(name, i, choice))));
  if (map.names.length > legendMost) legend.textContent = `${map.names.length} ${map.kind}s: colours and shapes repeat. Choose one above to see it alone.`;
}

function legendEntry(name, i, choice) {
  const button = document.createElement("button");
  const sign = document.createElement("span");
  const text = document.createElement("bdi");
  sign.style.color = colours[i % colours.length];
  sign.textContent = shapeSigns[Math.floor(i / colours.length) % shapeSigns.length] + " ";
  text.textContent = name;
  button.append(sign, text);
  button.onclick = () => {
    choice.value = choice.value === String(i) ? "-1" : String(i);
    choice.onchange();
  };
  return button;
}

async function drawAll() {
  if (data.grid) await drawGrid(data.grid);
  if (data.maps.length) {
    await drawMap(data.maps[0]);
    document.getElementById("task").onchange = (event) => drawMap(data.maps[event.target.value]);
  }
  document.body.dataset.drawn = gl ? "webgl" : "svg";
}
drawAll();
