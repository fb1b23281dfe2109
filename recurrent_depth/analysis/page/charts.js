"use strict";
// Drawing: colours, charts with Observable Plot, legends, and the tooltip. It knows nothing of the selected token.

const SERIES = ["#3b76d6", "#d9680f", "#2a9d6f", "#b04fc4", "#c9a20c", "#d1495b", "#5b8a9a", "#7d6bd0"];
const KINDS = { settling: "#2a9d6f", marginal: "#c9a20c", drifting: "#d1495b" };

function isDark() {
  return document.documentElement.dataset.theme === "dark" ||
    (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
}

// A sequential scale from "early, near" to "late, far"; it begins near the colour of the page in both themes.
function ramp() {
  return isDark()
    ? d3.interpolateRgbBasis(["#20304a", "#2c5f8d", "#2f9c95", "#b9d36a", "#ffd166"])
    : d3.interpolateRgbBasis(["#eaf3fb", "#a9d3e8", "#5aa9c7", "#2b6cb0", "#2d2a6e"]);
}

function inkOn(colour) {
  // Black and white have a contrast of at least 4.58 with every colour if they change at this luminance (WCAG 2).
  const c = d3.rgb(colour);
  const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear(c.r) + 0.7152 * linear(c.g) + 0.0722 * linear(c.b) > 0.179 ? "#000000" : "#ffffff";
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const tip = () => document.getElementById("tip");
function showTip(text, x, y) {
  const box = tip();
  box.textContent = text;
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  box.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 12) : y + 18}px`;
}
function hideTip() { tip().hidden = true; }

// Puts a chart into the element with this id. Drawing waits until the element is near the screen.
const drawers = new Map();
const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    const entry = drawers.get(target);
    entry.visible = isIntersecting;
    if (isIntersecting && entry.stale) drawNow(target, entry);
  }
}, { rootMargin: "300px" });

function drawNow(target, entry) {
  entry.stale = false;
  target.replaceChildren(...[entry.make(Math.max(240, target.clientWidth))].flat());
}

function draw(target, make) {
  if (typeof target === "string") target = document.getElementById(target);
  if (!drawers.has(target)) {
    drawers.set(target, { visible: false });
    watcher.observe(target);
    target.closest("figure").append(saveButton(target));
  }
  const entry = drawers.get(target);
  Object.assign(entry, { make, stale: true });
  if (entry.visible) drawNow(target, entry);
}

function redrawAll() {
  for (const [target, entry] of drawers) {
    entry.stale = true;
    if (entry.visible) drawNow(target, entry);
  }
}

function saveButton(target) {
  const save = () => {
    const svg = target.querySelector("svg").cloneNode(true);
    svg.style.color = getComputedStyle(document.body).color;
    const blob = new Blob([new XMLSerializer().serializeToString(svg)], { type: "image/svg+xml" });
    const link = element("a", { href: URL.createObjectURL(blob), download: `${target.id || "chart"}.svg` });
    link.click();
    URL.revokeObjectURL(link.href);
  };
  const name = target.closest("figure").querySelector("h3").textContent;
  const button = element("button", { type: "button", className: "save", textContent: "SVG", onclick: save });
  button.setAttribute("aria-label", `Save “${name}” as SVG`);
  return button;
}

function key(names, colours) {
  const line = element("div", { className: "key" });
  names.forEach((name, i) => {
    const entry = element("span", { textContent: name });
    entry.style.setProperty("--c", colours[i % colours.length]);
    line.append(entry);
  });
  return line;
}

// Lines over the iterations. lines: [{name, values: [{x, y}], colour}]
function lineChart(width, lines, { y, yLabel, log = false, mark = null, band = null, xLog = false, points = false }) {
  const rows = lines.flatMap((line) => line.values.map((p) => ({ ...p, name: line.name, colour: line.colour })));
  const usable = log ? rows.filter((p) => p.y > 0) : rows;
  const marks = [
    band ? Plot.areaY(band, { x: "x", y1: "low", y2: "high", fill: "var(--band)", fillOpacity: 0.8 }) : null,
    mark === null ? null : Plot.ruleX([mark], { stroke: "var(--accent)", strokeDasharray: "3,3" }),
    ...lines.map((line) => Plot.line(usable.filter((p) => p.name === line.name), { x: "x", y: "y", stroke: line.colour, strokeWidth: 2.2,
      strokeLinejoin: "round", strokeDasharray: line.flat ? "6,5" : null })),
    points ? Plot.dot(usable.filter((p) => p.e !== null), { x: "x", y: "y", fill: "colour", r: 3 }) : null,
    points ? Plot.ruleX(usable.filter((p) => p.e > 0), { x: "x", y1: (p) => p.y - p.e, y2: (p) => p.y + p.e, stroke: "colour" }) : null,
    Plot.tip(usable, Plot.pointer({ x: "x", y: "y", title: (p) => `${p.name}\niteration ${p.x}: ${format(p.y)}`,
      fill: "var(--card)", stroke: "var(--line)" })),
  ];
  const chart = Plot.plot({
    width, height: 250, marginLeft: 52, marginRight: 14, marginBottom: 44, marks, style: { background: "transparent", fontSize: "12px" },
    x: { label: "iteration", labelOffset: 38, ticks: Math.max(4, Math.round(width / 70)), ...(xLog ? { type: "log", ticks: [...new Set(rows.map((p) => p.x))], tickFormat: "d" } : { domain: d3.extent(rows, (p) => p.x) }) },
    y: { label: yLabel, grid: true, domain: y, ...(log ? { type: "log", tickFormat: power, ticks: 6 } : { ticks: 5 }) },
  });
  return lines.length > 1 ? [key(lines.map((l) => l.name), lines.map((l) => l.colour)), chart] : chart;
}

function power(value) {
  const exponent = Math.round(Math.log10(value));
  return Math.abs(value / 10 ** exponent - 1) < 1e-9 ? "10" + String(exponent).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]) : "";
}

function format(value) {
  return value === 0 ? "0" : Math.abs(value) >= 0.01 && Math.abs(value) < 1e4 ? d3.format(".3~r")(value) : d3.format(".2~e")(value);
}

// The path of one state in the plane of the first two components, coloured by iteration.
function pathChart(width, points, current, shares) {
  const percent = (i) => `component ${i + 1} (${(100 * shares[i]).toFixed(0)}% of the variance)`;
  const segments = points.slice(1).map((p, i) => ({ x1: points[i].x, y1: points[i].y, x2: p.x, y2: p.y, step: p.step }));
  const longest = Math.log(points[points.length - 1].step + 1);
  const colour = (step) => ramp()(0.3 + 0.7 * Math.log(step + 1) / longest);
  return Plot.plot({
    width, height: Math.min(360, Math.max(260, width * 0.7)), marginLeft: 52, marginBottom: 44, inset: 14, style: { background: "transparent", fontSize: "12px" },
    x: { label: percent(0), labelOffset: 38, nice: true, ticks: Math.max(3, Math.round(width / 90)) }, y: { label: percent(1), nice: true, grid: true, ticks: 6 },
    marks: [
      Plot.link(segments, { x1: "x1", y1: "y1", x2: "x2", y2: "y2", stroke: (s) => colour(s.step), strokeWidth: 1.8 }),
      Plot.dot(points, { x: "x", y: "y", fill: (p) => colour(p.step), r: 2.6 }),
      Plot.dot(points.slice(-1), { x: "x", y: "y", symbol: "star", r: 6, fill: "currentColor" }),
      Plot.dot(current, { x: "x", y: "y", r: 7, stroke: "var(--accent)", strokeWidth: 3 }),
      Plot.tip(points, Plot.pointer({ x: "x", y: "y", title: (p) => `iteration ${p.step}`, fill: "var(--card)", stroke: "var(--line)" })),
    ],
  });
}

// Tokens (lines) x iterations (columns) as an image, with axes, the chosen iteration and the selected token.
function heatChart(width, { value, rows, columns, labels, breaks, step, token, low, high, onHover, onSelect }) {
  const shown = rows <= 72, left = shown ? 96 : 48, height = shown ? 40 + rows * 17 : 520, top = 8, bottom = 34;
  const image = element("canvas", { width: columns.length, height: rows });
  const pixels = image.getContext("2d").createImageData(columns.length, rows);
  const colours = d3.range(256).map((i) => d3.rgb(d3.interpolateInferno(0.04 + 0.94 * i / 255)));
  for (let row = 0; row < rows; row++) for (let column = 0; column < columns.length; column++) {
    const v = value(row, column), part = v > 0 ? (Math.log(v) - Math.log(low)) / (Math.log(high) - Math.log(low)) : 0;
    const c = colours[Math.round(255 * Math.min(1, Math.max(0, part)))];
    pixels.data.set([c.r, c.g, c.b, 255], 4 * (row * columns.length + column));
  }
  image.getContext("2d").putImageData(pixels, 0, 0);
  const x = d3.scaleBand(d3.range(columns.length), [left, width - 8]), y = d3.scaleLinear([0, rows], [top, height - bottom]);
  const svg = d3.create("svg").attr("width", width).attr("height", height).attr("viewBox", [0, 0, width, height])
    .attr("role", "img").attr("aria-label", "Heat map of the distance to the final state").style("cursor", "crosshair");
  svg.append("image").attr("href", image.toDataURL()).attr("x", left).attr("y", top).attr("width", width - 8 - left)
    .attr("height", height - bottom - top).attr("preserveAspectRatio", "none").style("image-rendering", "pixelated");
  const every = Math.ceil(columns.length / Math.max(4, width / 55));
  const place = (i) => x(i) + x.bandwidth() / 2;
  const axis = svg.append("g").attr("fill", "currentColor").attr("font-size", 12).attr("text-anchor", "middle");
  columns.forEach((c, i) => { if ((i + 1) % every === 0 || i === 0) axis.append("text").attr("x", place(i)).attr("y", height - bottom + 16).text(c); });
  axis.append("text").attr("x", (left + width) / 2).attr("y", height - 2).text("iteration →");
  const names = svg.append("g").attr("fill", "currentColor").attr("font-size", 12).attr("text-anchor", "end");
  for (const row of shown ? d3.range(rows) : d3.ticks(0, rows - 1, 8)) {
    const text = shown ? labels(row).slice(0, 12) : row;
    names.append("text").attr("x", left - 6).attr("y", y(row + 0.5) + 4).attr("font-family", "ui-monospace, monospace").text(text);
  }
  for (const row of breaks) svg.append("line").attr("x1", 0).attr("x2", width - 8).attr("y1", y(row)).attr("y2", y(row)).attr("stroke", "var(--quiet)");
  const thick = Math.max(3, y(1) - y(0));
  svg.append("rect").attr("x", left).attr("width", width - 8 - left).attr("y", y(token + 0.5) - thick / 2).attr("height", thick)
    .attr("fill", "none").attr("stroke", "var(--accent)").attr("stroke-width", 2);
  svg.append("line").attr("x1", place(step)).attr("x2", place(step)).attr("y1", top).attr("y2", height - bottom)
    .attr("stroke", "white").attr("stroke-dasharray", "3,3").attr("stroke-opacity", 0.8);
  const at = (event) => {
    const [px, py] = d3.pointer(event, svg.node());
    const column = Math.floor((px - left) / x.step()), row = Math.floor(y.invert(py));
    return px >= left && column < columns.length && row >= 0 && row < rows ? [row, column] : null;
  };
  svg.on("pointermove", (event) => { const found = at(event); if (found) showTip(onHover(...found), event.clientX, event.clientY); else hideTip(); })
    .on("pointerleave", hideTip).on("click", (event) => { const found = at(event); if (found) onSelect(...found); });
  const scale = element("div", { className: "key" }, `${format(low)} `, element("i"), ` ${format(high)}`);
  Object.assign(scale.querySelector("i").style, { display: "inline-block", width: "10rem", height: ".6rem", borderRadius: ".3rem",
    background: `linear-gradient(to right, ${d3.range(9).map((i) => d3.interpolateInferno(0.04 + 0.94 * i / 8))})` });
  scale.style.alignItems = "center";
  return [scale, svg.node()];
}

function table(head, rows) {
  const line = (tag, cells) => element("tr", {}, ...cells.map((cell) => element(tag, { textContent: cell })));
  const made = element("table", {}, element("thead", {}, line("th", head)), element("tbody", {}, ...rows.map((r) => line("td", r))));
  return element("div", { className: "table" }, made);
}
