"use strict";
// The page: data, the chosen iteration and token, and what is shown for them.

const DATA = JSON.parse(document.getElementById("data").textContent);
document.getElementById("data").remove();
const TYPES = { float32: Float32Array, int8: Int8Array, int16: Int16Array, int32: Int32Array, uint16: Uint16Array, uint32: Uint32Array };

function decode({ type, shape, data }) {
  const text = atob(data), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return Object.assign(new TYPES[type](bytes.buffer), { shape });
}
const A = Object.fromEntries(Object.entries(DATA.arrays).map(([name, packed]) => [name, decode(packed)]));
DATA.arrays = null;
const STEPS = DATA.steps, R = STEPS.length, N = A.ids.length, K = A.top_ids.shape[2], C = A.coordinates.shape[2];
const last = (window) => window.first + window.count;
const windowOf = (token) => DATA.windows.find((window) => token < last(window));
const at = (name, step, token) => A[name][step * N + token];
const word = (number) => DATA.vocabulary[number];
const shown = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length)) || "∅";
const candidate = (step, token, k) => ({ id: A.top_ids[(step * N + token) * K + k], p: A.top_probabilities[(step * N + token) * K + k] });
const $ = (id) => document.getElementById(id);
const state = { step: Math.min(R - 1, 3), token: 0, colour: "settled", ordered: true };

// Iterations to convergence by a rule (a number of DATA.exits, or "settled"); Infinity: later than the recorded ones.
// In order, a token stops only after all earlier tokens of its window.
function stopTimes(rule, ordered) {
  const first = rule === "settled" ? A.settled : A.exits.subarray(rule * N, (rule + 1) * N);
  const times = Array.from(first, (t) => t || Infinity);
  if (ordered) for (const window of DATA.windows) for (let t = window.first + 1; t < last(window); t++) times[t] = Math.max(times[t], times[t - 1]);
  return times;
}

const COLOURS = {
  settled: { label: "final answer", text: "Colour: the iteration from which the most probable token is the final one and stays it." },
  ...Object.fromEntries(DATA.exits.map((name, i) => [`exit ${i}`, { label: `exit rule ${name}`, text: `Colour: the iteration at which the exit rule “${name}” would stop the token. The trajectories go on: nothing is stopped here.` }])),
  distance: { label: "distance at this iteration", text: "Colour: distance of the state to its final state, at the chosen iteration (logarithmic)." },
  entropy: { label: "entropy at this iteration", text: "Colour: how undecided the answer is at the chosen iteration, in nats." },
  kind: { label: "kind of path", text: "Colour: whether the state settles, circles around one place, or drifts." },
};

function tokenColours() {
  const scale = ramp(), name = state.colour;
  if (name === "kind") return { colours: Array.from(A.classes, (c) => KINDS[DATA.classes[c]]), never: [], kinds: true };
  if (name === "distance" || name === "entropy") {
    const values = A[name].subarray(state.step * N, (state.step + 1) * N);
    const [low, high] = name === "distance" ? distanceRange() : [0, d3.max(A.entropy)];
    const part = name === "distance" ? (v) => Math.log(Math.max(v, low) / low) / Math.log(high / low) : (v) => v / (high || 1);
    return { colours: Array.from(values, (v) => scale(Math.min(1, Math.max(0, part(v))))), never: [], low: format(low), high: format(high) };
  }
  const times = stopTimes(name === "settled" ? name : +name.slice(5), state.ordered);
  const most = Math.max(2, d3.max(times.filter(isFinite)) || 2);
  return { colours: times.map((t) => scale(Math.min(1, (t - 1) / (most - 1)))), never: times.map((t) => !isFinite(t)), low: "1 iteration", high: `${most} iterations` };
}

let range;
function distanceRange() {
  if (!range) {
    const positive = Array.from(A.distance.filter((v) => v > 0)).sort(d3.ascending);
    range = positive.length ? [Math.max(1e-6, d3.quantileSorted(positive, 0.02)), Math.max(1e-5, d3.quantileSorted(positive, 0.995))] : [1e-6, 1];
  }
  return range;
}

let buttons;
function buildText() {
  $("windows").append(...DATA.windows.map((window) => {
    const box = element("div", { className: "window" }, element("h3", { textContent: window.name }));
    for (let t = window.first; t < last(window); t++) {
      const text = word(A.ids[t]);
      const token = element("button", { className: "token", tabIndex: t ? -1 : 0, type: "button" }, element("span", { textContent: shown(text) }), element("small"));
      token.dataset.token = t;
      box.append(token);
      if (text.includes("\n")) box.append(element("span", { className: "break" }));
    }
    return box;
  }));
  $("windows").classList.toggle("many", DATA.windows.length > 3);
  buttons = [...document.querySelectorAll(".token")];
  const which = (event) => event.target.closest?.(".token");
  $("windows").addEventListener("click", (event) => { if (which(event)) select(+which(event).dataset.token); });
  $("windows").addEventListener("keydown", moveByKey);
  $("windows").addEventListener("pointerover", (event) => { if (which(event)) showTip(describe(+which(event).dataset.token), event.clientX, event.clientY); });
  $("windows").addEventListener("pointerout", hideTip);
  $("windows").addEventListener("focusin", (event) => {
    const box = which(event)?.getBoundingClientRect();
    if (box && which(event).matches(":focus-visible")) showTip(describe(+which(event).dataset.token), box.left, box.bottom);
  });
  $("windows").addEventListener("focusout", hideTip);
}

function moveByKey(event) {
  const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1], Home: [-N, 0], End: [N, 0] };
  const move = moves[event.key];
  if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (move[1]) setStep(state.step + move[1]);
  else select(Math.max(0, Math.min(N - 1, state.token + move[0])), true);
  showTip(describe(state.token), buttons[state.token].getBoundingClientRect().left, buttons[state.token].getBoundingClientRect().bottom);
}

function describe(token, step = state.step) {
  const best = candidate(step, token, 0), time = stopTimes("settled", false)[token];
  return `“${shown(word(A.ids[token]))}”, token ${token}, iteration ${STEPS[step]}\nanswer: ${shown(word(best.id))} (${d3.format(".1%")(best.p)})\n` +
    `distance: ${format(at("distance", step, token))}, entropy: ${format(at("entropy", step, token))}\n` +
    `final answer: ${isFinite(time) ? `from iteration ${time}` : "later"}, ${DATA.classes[A.classes[token]]}`;
}

function paintText() {
  const { colours, never } = tokenColours();
  buttons.forEach((button, token) => {
    const best = candidate(state.step, token, 0);
    button.style.background = colours[token];
    button.style.color = inkOn(colours[token]);
    button.lastChild.textContent = shown(word(best.id));
    button.classList.toggle("final", best.id === candidate(R - 1, token, 0).id);
    button.classList.toggle("never", Boolean(never[token]));
  });
}

function paintLegend() {
  const { low, high, kinds, never } = tokenColours(), legend = $("legend");
  $("colour-text").textContent = COLOURS[state.colour].text;
  if (kinds) return legend.replaceChildren(...DATA.classes.map((name) => {
    const swatch = element("i", { className: "swatch" });
    swatch.style.background = KINDS[name];
    return element("span", {}, swatch, name);
  }));
  const bar = element("span", { className: "ramp" });
  bar.style.background = `linear-gradient(to right, ${d3.range(7).map((i) => ramp()(i / 6))})`;
  const dashed = never.some(Boolean) ? [element("span", { textContent: `dashed: not within ${DATA.num_steps} iterations` })] : [];
  legend.replaceChildren(element("span", { textContent: low }), bar, element("span", { textContent: high }), ...dashed);
}

function select(token, focus = false) {
  buttons[state.token].setAttribute("aria-pressed", "false");
  buttons[state.token].tabIndex = -1;
  state.token = token;
  buttons[token].setAttribute("aria-pressed", "true");
  buttons[token].tabIndex = 0;
  if (focus) buttons[token].focus({ focusVisible: true });
  paintToken();
  paintHeat();
}

function setStep(step) {
  state.step = Math.max(0, Math.min(R - 1, step));
  $("iteration").value = state.step;
  $("iteration").setAttribute("aria-valuetext", `iteration ${STEPS[state.step]}`);
  $("step").textContent = `${STEPS[state.step]} of ${DATA.num_steps}`;
  paintText();
  if (state.colour === "distance" || state.colour === "entropy") paintLegend();
  paintToken();
  paintHeat();
  paintAll();
}

function paintToken() {
  const { token, step } = state, time = (rule) => { const t = stopTimes(rule, state.ordered)[token]; return isFinite(t) ? t : `> ${DATA.num_steps}`; };
  const fact = (name, value) => element("div", {}, element("b", { textContent: value }), name);
  $("token-facts").replaceChildren(
    fact(`token ${token} of ${windowOf(token).name}`, shown(word(A.ids[token]))), fact("path", DATA.classes[A.classes[token]]),
    fact("final answer from iteration", time("settled")), ...DATA.exits.map((name, i) => fact(`stops by ${name}`, time(i))),
    fact("distance now", format(at("distance", step, token))), fact("entropy now", format(at("entropy", step, token))), fact("KL to the end now", format(at("kl", step, token))));
  const found = d3.range(K).map((k) => candidate(step, token, k));
  const bests = d3.range(R).map((s) => candidate(s, token, 0).id);  // the final answer has the first colour
  const ids = [...new Set([bests[R - 1], ...found.map((c) => c.id), ...bests])].slice(0, SERIES.length);
  const colour = (id) => ids.includes(id) ? SERIES[ids.indexOf(id)] : "var(--quiet)";
  $("candidates").replaceChildren(...found.map(({ id, p }) => {
    const bar = element("i");
    bar.style.width = `${100 * p}%`;
    bar.style.setProperty("--c", colour(id));
    return element("div", { className: "bar" }, element("code", { textContent: shown(word(id)) }), bar, element("span", { textContent: d3.format(".1%")(p) }));
  }));
  const lines = ids.map((id) => ({ name: shown(word(id)), colour: colour(id), values: d3.range(R).map((s) => {
    const k = d3.range(K).find((k) => candidate(s, token, k).id === id);
    return { x: STEPS[s], y: k === undefined ? NaN : candidate(s, token, k).p };  // a gap
  }) }));
  draw("answer", (width) => lineChart(width, lines, { y: [0, 1], yLabel: "probability", mark: STEPS[step] }));
  const point = (s) => ({ x: A.coordinates[(s * N + token) * C], y: A.coordinates[(s * N + token) * C + 1], step: STEPS[s] });
  draw("path", (width) => pathChart(width, d3.range(R).map(point), [point(step)], DATA.component_shares));
  const band = d3.range(R).map((s) => ({ x: STEPS[s], ...quartiles("distance", s) })).filter((q) => q.low > 0);
  const own = { name: "this token", colour: SERIES[0], values: d3.range(R).map((s) => ({ x: STEPS[s], y: at("distance", s, token) })) };
  draw("distance", (width) => lineChart(width, [own], { yLabel: "distance / size", log: true, mark: STEPS[step], band }));
}

const quartileCache = new Map();
function quartiles(name, step) {
  const cached = `${name} ${step}`;
  if (!quartileCache.has(cached)) {
    const sorted = A[name].slice(step * N, (step + 1) * N).sort();
    quartileCache.set(cached, { low: d3.quantileSorted(sorted, 0.25), mid: d3.quantileSorted(sorted, 0.5), high: d3.quantileSorted(sorted, 0.75) });
  }
  return quartileCache.get(cached);
}

function paintHeat() {
  const [low, high] = distanceRange();
  draw("heat", (width) => heatChart(width, {
    rows: N, columns: STEPS, step: state.step, token: state.token, low, high, labels: (t) => shown(word(A.ids[t])), breaks: DATA.windows.slice(1).map((window) => window.first),
    value: (t, s) => at("distance", s, t), onHover: (t, s) => describe(t, s), onSelect: (t, s) => { select(t); setStep(s); },
  }));
}

function paintAll() {
  const over = (f) => d3.range(R).map((s) => ({ x: STEPS[s], y: f(s) }));
  const mark = STEPS[state.step], column = (name, s) => A[name].subarray(s * N, (s + 1) * N);
  const rules = [["settled", "final answer"], ...DATA.exits.map((name, i) => [i, name])];
  const stopped = rules.map(([rule, name], i) => {
    const times = stopTimes(rule, state.ordered);
    return { name, colour: SERIES[i % SERIES.length], values: over((s) => 100 * times.filter((t) => t <= STEPS[s]).length / N) };
  });
  draw("times", (width) => lineChart(width, stopped, { y: [0, 100], yLabel: "% of the tokens", mark }));
  const moves = [["relative_change", "change per iteration"], ["distance", "distance to the final state"]];
  draw("change", (width) => lineChart(width, moves.map(([name, label], i) => ({ name: label, colour: SERIES[i], values: over((s) => quartiles(name, s).mid) })), { yLabel: "relative to the size", log: true, mark }));
  const sure = [["entropy", "entropy"], ["kl", "KL to the final answer"]];
  draw("entropy", (width) => lineChart(width, sure.map(([name, label], i) => ({ name: label, colour: SERIES[i], values: over((s) => d3.mean(column(name, s))) })), { yLabel: "nats", mark }));
  const W = A.correlation.shape[1];
  draw("health", (width) => lineChart(width, [{ name: "token correlation", colour: SERIES[0], values: over((s) => d3.mean(A.correlation.subarray(s * W, (s + 1) * W))) }], { yLabel: "mean cosine", mark }));
}

function paintOnce() {
  const counts = DATA.classes.map((name, c) => ({ name, n: A.classes.filter((k) => k === c).length }));
  $("kinds").replaceChildren(...counts.map(({ name, n }) => {
    const bar = element("i");
    bar.style.width = `${100 * n / N}%`;
    bar.style.setProperty("--c", KINDS[name]);
    return element("div", { className: "bar" }, element("code", { textContent: name }), bar, element("span", { textContent: d3.format(".0%")(n / N) }));
  }));
  $("kinds-text").textContent = `${DATA.class_rule} The trajectories have ${DATA.converged_steps} iterations.`;
  $("path-text").textContent = "The state has many dimensions; this is its shadow on the two directions in which the states of all tokens differ most. Dark to bright: first to last iteration; star: the end; ring: the chosen iteration.".replace("Dark to bright", isDark() ? "Dark to bright" : "Light to dark");
  $("independence").hidden = !A.path_median.length;
  if (A.path_median.length) {
    const lines = d3.range(A.path_median.shape[0]).map((seed) => ({ name: `random start ${seed + 1}`, colour: SERIES[(seed + 1) % SERIES.length], values: STEPS.map((x, s) => ({ x, y: A.path_median[seed * R + s] })) }));
    const own = { name: "start at zero", colour: SERIES[0], values: STEPS.map((x, s) => ({ x, y: quartiles("distance", s).mid })) };
    draw("paths", (width) => lineChart(width, [own, ...lines], { yLabel: "distance / size", log: true }));
    const ends = DATA.path_independence.map((p) => format(p.median_distance)).join(", ");
    $("paths-text").textContent = `Median distance to the final state, if the first state is zero and if it is random. Curves that fall together mean that the end does not depend on the start (path independence). After ${DATA.converged_steps} iterations: ${ends}.`;
  }
  $("jacobian").hidden = !DATA.jacobian.length;
  if (DATA.jacobian.length) $("radii").replaceChildren(table(["token", "iteration", "radius", "residual", "gain"], d3.sort(DATA.jacobian, (r) => r.token, (r) => r.iteration).map((r) =>
    [`${r.token} ${r.token < N ? shown(word(A.ids[r.token])) : ""}`, r.iteration, r.radius.toFixed(3), r.residual < 1e-9 ? "exact" : format(r.residual), r.gain.toFixed(3)])));
  paintResults();
}

function paintResults() {
  $("results").hidden = !DATA.results.length;
  for (const [title, rows] of d3.group(DATA.results, (r) => `${r.task || ""}: ${r.metric}`)) {
    const setting = (r) => [r.model, r.difficulty, r.mode, r.budget, r.seed === null ? "" : `state seed ${r.seed}`].filter(Boolean).join(", ");
    const groups = [...d3.group(rows, setting)], steps = [...new Set(rows.map((r) => r.num_steps))].sort(d3.ascending);
    const scale = rows[0].percent ? 100 : 1, few = groups.filter(([, found]) => ["all", ""].includes(found[0].difficulty) || groups.length <= 8).slice(0, 8);
    const point = (r) => ({ x: r.num_steps, y: scale * r.value, e: scale * (r.stderr || 0) });
    const lines = few.map(([name, found], i) => ({
      name, colour: SERIES[i % SERIES.length], flat: found.length === 1,
      values: found.length > 1 ? d3.sort(found, (r) => r.num_steps).map(point) : steps.map((x) => ({ ...point(found[0]), x, e: null })),
    }));
    const chart = element("div", { className: "chart" });
    const cells = groups.map(([name, found]) => [name, ...steps.map((s) => found.find((r) => r.num_steps === s)?.shown ?? "")]);
    $("evaluations").append(element("figure", {}, element("h3", { textContent: title }), chart, table([rows[0].percent ? "in %, by iterations" : "by iterations", ...steps], cells)));
    draw(chart, (width) => lineChart(width, lines, { yLabel: rows[0].percent ? `${rows[0].metric}, %` : rows[0].metric, xLog: true, points: true }));
  }
}

const THEMES = { "": "Theme: auto", light: "Theme: light", dark: "Theme: dark" };
function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme;
  $("theme").textContent = THEMES[theme];
  paintText();
  paintLegend();
  redrawAll();
}

let timer = null;
function play() {
  if (timer) { clearInterval(timer); timer = null; $("play").textContent = "Play"; return; }
  $("play").textContent = "Pause";
  if (state.step === R - 1) setStep(0);
  timer = setInterval(() => { if (state.step === R - 1) play(); else setStep(state.step + 1); }, 350);
}

function begin() {
  const hiddenTokens = DATA.total_tokens > N ? ` (the first ${N} are shown)` : "", hiddenSteps = DATA.num_steps > R ? ` (${R} of them are shown)` : "";
  $("facts").textContent = `${DATA.total_tokens} tokens${hiddenTokens}, ${DATA.num_steps} iterations${hiddenSteps}. Final state: after ${DATA.converged_steps} iterations. ${DATA.model}, ${DATA.dtype}, recurrent-depth ${DATA.version}.`;
  $("iteration").max = R - 1;
  $("colour").append(...Object.entries(COLOURS).map(([value, { label }]) => element("option", { value, textContent: label })));
  buildText();
  $("iteration").addEventListener("input", () => setStep(+$("iteration").value));
  $("colour").addEventListener("change", () => { state.colour = $("colour").value; paintText(); paintLegend(); });
  $("ordered").addEventListener("change", () => { state.ordered = $("ordered").checked; paintText(); paintLegend(); paintToken(); paintAll(); });
  $("play").addEventListener("click", play);
  $("theme").addEventListener("click", () => { const names = Object.keys(THEMES); setTheme(names[(names.indexOf(document.documentElement.dataset.theme || "") + 1) % 3]); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(document.documentElement.dataset.theme || ""));
  addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redrawAll(); } });
  setStep(state.step);
  setTheme("");
  select(0);
  paintOnce();
  performance.mark("ready");
}
begin();
