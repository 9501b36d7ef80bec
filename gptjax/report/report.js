const view = { axis: data.axes[0], logX: data.logX, smoothing: 0, from: null, to: null };
const labels = data.labels || { steps: "training", evaluations: "validation" };
const drawings = [], heats = [];
const HEIGHT = 250, LEFT = 54, RIGHT = 22, TOP = 10, BOTTOM = 26;

// Exponential moving average without the bias of its start; a gap stays a gap.
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function ticks(low, high, log, count) {
  if (log) {
    const found = [], small = high / low < 30;
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const digit of small ? [1, 2, 3, 5, 7] : [1]) {
        const value = digit * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    if (found.length >= 2) {
      const every = Math.ceil(found.length / count);
      return found.filter((_, index) => index % every === 0);
    }
  }
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((digit) => digit * power >= rough) * power;
  const first = Math.ceil(low / step) * step, found = [];
  for (let n = 0; first + n * step <= high + step * 1e-9; n++) found.push(+(first + n * step).toPrecision(12));
  return found;
}

function scale(low, high, log, start, end) {
  const map = log ? Math.log10 : (value) => value;
  const a = map(low), b = map(high), width = b - a || 1;
  const to = (value) => start + ((map(value) - a) / width) * (end - start);
  to.inverse = (place) => {
    const value = a + ((place - start) / (end - start)) * width;
    return log ? 10 ** value : value;
  };
  return to;
}

// Of many runs the colour is the rank by the lowest validation loss, from orange (best) to blue.
const MANY = data.runs.length > 6;
const lowest = data.runs.map((run) => Math.min(...(run.evaluations.val_loss || run.evaluations.loss || []).filter((value) => value !== null)));
const ranks = data.runs.map((_, run) => lowest.filter((value) => value < lowest[run]).length);

function rankColor(run) {
  return `color-mix(in oklab, var(--c0) ${Math.round((100 * ranks[run]) / Math.max(1, data.runs.length - 1))}%, var(--c1))`;
}

function lines(chart) {
  return chart.series.map((series, index) => {
    const table = data.runs[series.run][series.table], points = series.table === "evaluations";
    const reference = series.table === "reference";
    const color = reference ? "var(--soft)" : MANY ? rankColor(series.run)
      : `var(--c${(data.runs.length > 1 ? series.run : index) % 6})`;
    const label = (data.runs.length > 1 ? data.runs[series.run].name + " " : "") + labels[series.table];
    const smooth = series.table === "steps" && series.column !== "learning_rate";
    return { x: table[view.axis], y: table[series.column], points, smooth, color, label, low: table.low, high: reference && table.high };
  });
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (value !== null && isFinite(value)) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low > high ? null : [low, high];
}

function wholeRange() {
  const tables = data.runs.flatMap((run) => [run.steps[view.axis], run.evaluations[view.axis]]);
  return extent(tables.flat()) || [0, 1];
}

function draw(drawing) {
  const { chart, svg, logY } = drawing, width = Math.max(280, svg.parentNode.clientWidth - 18 || 640);
  const whole = wholeRange();
  let [from, to] = [view.from ?? whole[0], view.to ?? whole[1]];
  if (view.logX && from <= 0) from = Math.min(1, to / 2);
  if (to <= from) to = from + 1;
  const inside = (x) => x !== null && x >= from && x <= to;
  const shown = lines(chart).map((line) => {
    const usable = line.y.map((y) => (y === null || (logY.checked && y <= 0) ? null : y));
    const soft = line.smooth && view.smoothing ? smoothed(usable, view.smoothing) : usable;
    return { ...line, y: usable, soft };
  });
  const range = extent(shown.flatMap((line) => line.y.filter((_, n) => inside(line.x[n])))) || [0, 1];
  let [low, high] = range;
  if (logY.checked && low > 0) { low /= 1.05; high *= 1.05; } else {
    const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    low = low >= 0 && low - room < 0 ? 0 : low - room;
    high += room;
  }
  const logged = logY.checked && low > 0;
  const X = scale(from, to, view.logX, LEFT, width - RIGHT), Y = scale(low, high, logged, HEIGHT - BOTTOM, TOP);
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.replaceChildren();
  const grid = make("g", { stroke: "var(--line)", "stroke-width": 1 });
  svg.append(grid);
  for (const value of ticks(low, high, logged, 6)) {
    grid.append(make("line", { x1: LEFT, x2: width - RIGHT, y1: Y(value), y2: Y(value) }));
    svg.append(make("text", { x: LEFT - 6, y: Y(value) + 4, "text-anchor": "end" }, readable(value)));
  }
  for (const value of ticks(from, to, view.logX, Math.floor(width / 90))) {
    svg.append(make("text", { x: X(value), y: HEIGHT - 8, "text-anchor": "middle" }, readable(value)));
  }
  const clip = `clip-${drawings.indexOf(drawing)}`;
  svg.append(make("defs", {}, make("clipPath", { id: clip },
    make("rect", { x: LEFT, y: 0, width: width - LEFT - RIGHT, height: HEIGHT - BOTTOM }))));
  const plot = make("g", { "clip-path": `url(#${clip})`, fill: "none" });
  svg.append(plot);
  for (const mark of data.marks) {
    const at = mark[view.axis];
    if (inside(at)) plot.append(make("line", { x1: X(at), x2: X(at), y1: TOP, y2: HEIGHT - BOTTOM,
      stroke: "var(--soft)", "stroke-dasharray": "3 3" }, make("title", {}, mark.text)));
  }
  const path = (line, values) => {
    let text = "", pen = false;
    values.forEach((value, n) => {
      const x = line.x[n];
      if (value === null || x === null || (view.logX && x <= 0)) { pen = false; return; }
      text += `${pen ? "L" : "M"}${X(x).toFixed(1)} ${Y(value).toFixed(1)}`;
      pen = true;
    });
    return text;
  };
  for (const line of shown.filter((line) => line.high)) {
    const there = line.x.map((x, n) => n).filter((n) => !view.logX || line.x[n] > 0);
    const edge = (values, order) => order.map((n) => `${X(line.x[n]).toFixed(1)} ${Y(values[n]).toFixed(1)}`);
    const outline = [...edge(line.high, there), ...edge(line.low, [...there].reverse())].join("L");
    plot.append(make("path", { d: `M${outline}Z`, fill: line.color, opacity: 0.25 }));
  }
  for (const line of [...shown].sort((a, b) => !!b.high - !!a.high)) {
    const dashed = line.high ? { "stroke-dasharray": "2 3" } : line.points && data.runs.length > 1 ? { "stroke-dasharray": "5 3" } : {};
    if (view.smoothing && line.smooth)
      plot.append(make("path", { d: path(line, line.y), stroke: line.color, "stroke-width": 1, opacity: 0.25 }));
    plot.append(make("path", { d: path(line, line.soft), stroke: line.color, "stroke-width": 1.8, ...dashed }));
    if (line.points && line.x.length < 200) line.y.forEach((value, n) => {
      if (value !== null && inside(line.x[n]))
        plot.append(make("circle", { cx: X(line.x[n]), cy: Y(value), r: 2.5, fill: line.color }));
    });
  }
  Object.assign(drawing, { X, Y, shown, width, from, to, inside });
}

// Colours of a heat map from low to high, readable for the colour-blind (viridis).
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

function rampColor(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1), n = Math.min(Math.floor(at), RAMP.length - 2);
  return `rgb(${RAMP[n].map((low, k) => Math.round(low + (at - n) * (RAMP[n + 1][k] - low))).join(",")})`;
}

// A cell reaches from its step to the next one that was logged; the last is as wide as the one before.
function drawHeat(heat) {
  const { map, svg, logColor, key } = heat, width = Math.max(280, svg.parentNode.clientWidth - 18 || 640);
  const left = 92, row = Math.max(12, Math.min(24, 220 / map.rows.length)), bottom = TOP + row * map.rows.length;
  const whole = wholeRange(), places = map[view.axis];
  let [from, to] = [view.from ?? whole[0], view.to ?? whole[1]];
  if (view.logX && from <= 0) from = Math.min(1, to / 2);
  if (to <= from) to = from + 1;
  const ends = places.map((x, n) => places[n + 1] ?? x + (n ? x - places[n - 1] : 1));
  const shown = places.map((x, n) => n).filter((n) => ends[n] > from && places[n] <= to && (!view.logX || places[n] > 0));
  const usable = (value) => value !== null && (!logColor.checked || value > 0);
  const [low, high] = extent(map.values.flatMap((values) => shown.map((n) => values[n]).filter(usable))) || [0, 1];
  const share = scale(low, high, logColor.checked && low > 0, 0, 1), X = scale(from, to, view.logX, left, width - RIGHT);
  svg.setAttribute("viewBox", `0 0 ${width} ${bottom + BOTTOM}`);
  svg.replaceChildren();
  map.rows.forEach((name, r) => {
    const y = bottom - row * (r + 1);
    svg.append(make("text", { x: left - 6, y: y + row / 2 + 4, "text-anchor": "end" }, name));
    for (const n of shown) {
      const value = map.values[r][n];
      if (!usable(value)) continue;
      const a = Math.max(left, X(Math.max(places[n], from))), b = Math.min(width - RIGHT, X(Math.min(ends[n], to)));
      if (b > a) svg.append(make("rect", { x: a.toFixed(1), y, width: (b - a + 0.3).toFixed(1), height: row,
        fill: rampColor(share(value)) }));
    }
  });
  for (const value of ticks(from, to, view.logX, Math.floor(width / 110)))
    svg.append(make("text", { x: X(value), y: bottom + 18, "text-anchor": "middle" }, readable(value)));
  key.replaceChildren(readable(low), ...[0, 0.25, 0.5, 0.75, 1].map((at) =>
    make("i", { class: "shade", style: `background:${rampColor(at)}` })), readable(high));
  Object.assign(heat, { X, row, bottom, left, width, ends, shown });
}

function pointAtHeat(heat, tip) {
  const { map, svg } = heat;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), size = heat.width / box.width;
    const x = heat.X.inverse((event.clientX - box.left) * size), places = map[view.axis];
    const r = Math.floor((heat.bottom - (event.clientY - box.top) * size) / heat.row);
    const n = heat.shown.find((index) => places[index] <= x && x < heat.ends[index]);
    tip.hidden = n === undefined || !(r in map.rows);
    if (tip.hidden) return;
    tip.replaceChildren(`${map.rows[r]}, step ${map.step[n]}: ${readable(map.values[r][n])}`);
    tip.style.top = "2.4rem";
    tip.style.right = "1rem";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
  svg.addEventListener("dblclick", () => zoom(null, null));
}

// One line for each run, from axis to axis; the lowest loss is orange and on top.
function drawParallel(place, axes) {
  const scales = axes.map(({ values }) => {
    const numbers = values.every((value) => value === null || typeof value === "number");
    const names = numbers ? [] : [...new Set(values)].sort();
    const of = (value) => (value === null ? null : numbers ? value : names.indexOf(value));
    const [low, high] = extent(values.map(of)) || [0, 1], log = numbers && low > 0 && high / low >= 8;
    const y = scale(low, high, log, 240, 30);
    const marks = numbers ? ticks(low, high, log, 5) : names.map((_, n) => n);
    return { at: (value) => (value === null ? null : low === high ? 135 : y(of(value))),
      marks: marks.map((mark) => [low === high ? 135 : y(mark), numbers ? readable(mark) : names[mark]]) };
  });
  const last = axes[axes.length - 1].values;
  const svg = make("svg", { class: "parallel", role: "img", "aria-label": "options and best validation loss of each run" });
  const tip = make("div", { class: "tip", hidden: "" });
  place.append(make("figure", { class: "wide" }, [make("figcaption", {}, "Options and result of each run"), svg, tip]));
  const redraw = () => {
    const width = Math.max(280, svg.parentNode.clientWidth - 18 || 640), X = (n) => 60 + (n * (width - 140)) / (axes.length - 1);
    svg.setAttribute("viewBox", `0 0 ${width} 265`);
    svg.replaceChildren();
    data.runs.map((run, r) => r).sort((a, b) => (last[b] ?? Infinity) - (last[a] ?? Infinity)).forEach((r) => {
      const points = axes.map((axis, n) => [X(n), scales[n].at(axis.values[r])]).filter(([, y]) => y !== null);
      const color = last[r] === null ? "var(--soft)" : rankColor(r);
      const line = make("path", { d: "M" + points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L"), fill: "none",
        stroke: color, "stroke-width": 1.8, opacity: 0.85 });
      line.addEventListener("pointerenter", () => {
        line.setAttribute("stroke-width", 4);
        tip.replaceChildren(make("div", {}, data.runs[r].name), ...axes.map((axis) => make("div", {},
          `${axis.name} ${typeof axis.values[r] === "number" ? readable(axis.values[r]) : axis.values[r] ?? "–"}`)));
        tip.hidden = false;
        tip.style.top = "2.4rem";
        tip.style.right = "1rem";
      });
      line.addEventListener("pointerleave", () => { line.setAttribute("stroke-width", 1.8); tip.hidden = true; });
      svg.append(line);
    });
    axes.forEach((axis, n) => {
      svg.append(make("line", { x1: X(n), x2: X(n), y1: 24, y2: 246, stroke: "var(--ink)" }));
      const anchor = n === 0 ? "start" : n === axes.length - 1 ? "end" : "middle";
      svg.append(make("text", { x: n === 0 ? 4 : n === axes.length - 1 ? width - 4 : X(n), y: 14, "text-anchor": anchor }, axis.name));
      for (const [y, text] of scales[n].marks) svg.append(make("text", { x: X(n) + 5, y: y + 4 }, text));
    });
  };
  redraw();
  addEventListener("resize", () => requestAnimationFrame(redraw));
}

function drawAll() { drawings.forEach(draw); heats.forEach(drawHeat); }

function zoom(from, to) {
  [view.from, view.to] = [from, to];
  drawAll();
}

function nearest(line, x) {
  let best = -1;
  line.x.forEach((value, n) => {
    if (value !== null && line.y[n] !== null && (best < 0 || Math.abs(value - x) < Math.abs(line.x[best] - x))) best = n;
  });
  return best;
}

function follow(drawing, tip) {
  const { svg } = drawing;
  const place = (event) => {
    const box = svg.getBoundingClientRect();
    return ((event.clientX - box.left) / box.width) * drawing.width;
  };
  let start = null, band = null, hair = null;
  const clear = () => { tip.hidden = true; if (hair) hair.remove(); hair = null; };
  svg.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "mouse" && event.button === 0) start = place(event);
  });
  svg.addEventListener("pointermove", (event) => {
    const at = Math.min(Math.max(place(event), LEFT), drawing.width - RIGHT), x = drawing.X.inverse(at);
    if (start !== null && Math.abs(at - start) > 4) {
      if (!band) svg.append(band = make("rect", { y: TOP, height: HEIGHT - TOP - BOTTOM, fill: "var(--accent)", opacity: 0.15 }));
      band.setAttribute("x", Math.min(at, start));
      band.setAttribute("width", Math.abs(at - start));
    }
    if (!hair) svg.append(hair = make("line", { y1: TOP, y2: HEIGHT - BOTTOM, stroke: "var(--soft)" }));
    hair.setAttribute("x1", at);
    hair.setAttribute("x2", at);
    tip.replaceChildren(make("div", {}, `${view.axis} ${readable(x)}`));
    const near = drawing.shown.map((line) => [line, nearest(line, x)]).filter(([, n]) => n >= 0);
    if (MANY) near.sort(([a, n], [b, m]) => a.soft[n] - b.soft[m]).splice(8);
    for (const [line, n] of near) {
      const value = view.smoothing && line.smooth ? `${readable(line.soft[n])} (${readable(line.y[n])})` : readable(line.y[n]);
      tip.append(make("div", { style: `color:${line.color}` }, `${line.label} ${value}`));
    }
    tip.hidden = false;
    const left = at / drawing.width < 0.5;
    tip.style.left = left ? `${(at / drawing.width) * 100 + 3}%` : "auto";
    tip.style.right = left ? "auto" : `${100 - (at / drawing.width) * 100 + 3}%`;
    tip.style.top = "3.2rem";
  });
  svg.addEventListener("pointerleave", () => { clear(); if (band) band.remove(); start = band = null; });
  svg.addEventListener("pointerup", (event) => {
    if (band) {
      const ends = [drawing.X.inverse(start), drawing.X.inverse(place(event))].sort((a, b) => a - b);
      zoom(Math.max(ends[0], drawing.from), Math.min(ends[1], drawing.to));
    }
    start = band = null;
    clear();
  });
  svg.addEventListener("dblclick", () => zoom(null, null));
}

function controls() {
  const place = document.getElementById("controls");
  const box = (label, input) => make("label", {}, [label + " ", input]);
  const slider = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, "aria-label": "smoothing" });
  const longest = Math.max(...data.runs.map((run) => run.steps[view.axis].length));
  view.smoothing = longest > 60 ? 0.6 : 0;
  slider.value = view.smoothing;
  slider.addEventListener("input", () => { view.smoothing = +slider.value; drawAll(); });
  const axis = make("select", { "aria-label": "x axis" }, data.axes.map((name) => make("option", { value: name }, name)));
  axis.addEventListener("change", () => { view.axis = axis.value; zoom(null, null); });
  const logX = make("input", { type: "checkbox" });
  logX.checked = view.logX;
  logX.addEventListener("change", () => { view.logX = logX.checked; drawAll(); });
  const parts = [["first tenth", 0, 0.1], ["last half", 0.5, 1], ["whole run", null, null]].map(([name, a, b]) => {
    const button = make("button", { type: "button" }, name);
    button.addEventListener("click", () => {
      const [low, high] = wholeRange();
      zoom(a === null ? null : low + a * (high - low), b === null ? null : low + b * (high - low));
    });
    return button;
  });
  place.append(box("smoothing", slider), box("x axis", axis), box("logarithmic x", logX), ...parts);
}

controls();
if ((data.parallel || []).length) drawParallel(document.getElementById("parallel"), data.parallel);
data.charts.forEach((chart, index) => {
  const logY = make("input", { type: "checkbox" }), svg = make("svg", { role: "img", "aria-label": chart.title });
  const tip = make("div", { class: "tip", hidden: "" });
  const legend = make("div", { class: "legend" }, MANY ? ["orange: lowest validation loss, blue: highest"] : lines(chart).map((line) =>
    make("span", {}, [make("i", { style: `border-color:${line.color};${line.points && data.runs.length > 1 ? "border-top-style:dashed" : ""}` }), line.label])));
  const title = make("span", {}, [chart.title, " ", make("small", {}, chart.unit)]);
  const figure = make("figure", index === 0 ? { class: "wide" } : {},
    [make("figcaption", {}, [title, make("label", {}, [logY, " logarithmic"])]), svg, legend, tip]);
  document.getElementById("charts").append(figure);
  const drawing = { chart, svg, logY };
  drawings.push(drawing);
  logY.addEventListener("change", () => draw(drawing));
  follow(drawing, tip);
});
(data.heat_maps || []).forEach((map) => {
  const logColor = make("input", { type: "checkbox" }), svg = make("svg", { role: "img", "aria-label": map.title });
  const tip = make("div", { class: "tip", hidden: "" }), key = make("div", { class: "legend" });
  const positive = map.values.flat().filter((value) => value !== null && value > 0).sort((a, b) => a - b);
  logColor.checked = positive.length > 0 && positive[Math.floor(positive.length * 0.99)] / positive[0] > 20;
  const title = make("span", {}, [map.title, " ", make("small", {}, map.unit)]);
  document.getElementById("charts").append(make("figure", {},
    [make("figcaption", {}, [title, make("label", {}, [logColor, " logarithmic colours"])]), svg, key, tip]));
  const heat = { map, svg, logColor, key };
  heats.push(heat);
  logColor.addEventListener("change", () => drawHeat(heat));
  pointAtHeat(heat, tip);
});
drawAll();
let waiting = 0;
addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(drawAll); });
