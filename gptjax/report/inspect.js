const T = data.tokens.length, CELLS = (T * (T + 1)) / 2;
const bytes = Uint8Array.from(atob(data.weights), (letter) => letter.charCodeAt(0));
const weights = new DataView(bytes.buffer);
const view = { layer: data.layers - 1, head: 0, token: Math.floor(T / 2), kept: false };
const get = (id) => document.getElementById(id);
const spans = [];

// How much position t attends to position s.
function weight(layer, head, t, s) {
  if (s > t) return 0;
  return weights.getUint16(2 * ((layer * data.heads + head) * CELLS + (t * (t + 1)) / 2 + s), true) / 65535;
}

function shown(token) {
  const text = data.texts[token] ?? "";
  return text === "" ? "∅" : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣");
}

const percent = (value) => (value === null ? "–" : value >= 0.0001 ? (100 * value).toPrecision(3) + " %" : (100 * value).toExponential(1) + " %");

function table(heads, rows) {
  return make("table", {}, [
    make("tr", {}, heads.map((head) => make("th", {}, head))),
    ...rows.map((row) => make("tr", row.marked ? { class: "chosen" } : {}, row.cells.map((cell) => make("td", {}, cell)))),
  ]);
}

function showToken() {
  const t = view.token, next = t + 1 < T ? data.tokens[t + 1] : null;
  spans.forEach((span, s) => {
    const share = s <= t ? weight(view.layer, view.head, t, s) : 0;
    span.style.borderBottom = `4px solid color-mix(in srgb, var(--accent) ${Math.round(100 * Math.sqrt(share))}%, transparent)`;
    span.style.outline = s === t ? "2px solid var(--ink)" : "none";
    span.title = `${s}: ${shown(data.tokens[s])} · ${data.surprisal[s] === null ? "first token" : `${data.surprisal[s]} bits, rank ${data.ranks[s] + 1}`} · attention ${percent(share)}`;
  });
  get("candidates").replaceChildren(table(["", "token", "logit", "probability"], data.top[t].map((token, k) => ({
    marked: token === next, cells: [String(k + 1), shown(token), String(data.topLogits[t][k]), percent(data.topProbabilities[t][k])] }))),
    make("p", { class: "hint" }, next === null ? "The text ends here." :
      `The text continues with “${shown(next)}”: rank ${data.ranks[t + 1] + 1}, ${data.surprisal[t + 1]} bits.`));
  get("lens").replaceChildren(table(["after", ...data.lens[0][0].map((_, k) => `${k + 1}.`), "the text's next token"], data.lens.map((layer, n) => ({
    marked: layer[t][0] === next,
    cells: [n === 0 ? "embedding" : `layer ${n}`, ...layer[t].map((token, k) => `${shown(token)} ${percent(data.lensProbabilities[n][t][k])}`), percent(data.lensNext[n][t])] }))));
}

function paint(canvas, layer, head) {
  const context = canvas.getContext("2d"), image = context.createImageData(T, T);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const [from, to] = dark ? [[28, 34, 42], [108, 182, 255]] : [[246, 248, 250], [9, 80, 190]];
  for (let t = 0; t < T; t++) for (let s = 0; s < T; s++) {
    const share = Math.sqrt(weight(layer, head, t, s)), at = 4 * (t * T + s);
    for (let c = 0; c < 3; c++) image.data[at + c] = from[c] + share * (to[c] - from[c]);
    image.data[at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

function showHead() {
  get("which").textContent = `Layer ${view.layer + 1}, head ${view.head + 1}: mean entropy ${data.entropies[view.layer][view.head]} nats`;
  paint(get("matrix"), view.layer, view.head);
  document.querySelectorAll("#all canvas").forEach((canvas) =>
    canvas.classList.toggle("chosen", +canvas.dataset.layer === view.layer && +canvas.dataset.head === view.head));
  layerChoice.value = view.layer;
  headChoice.value = view.head;
  showToken();
}

data.tokens.forEach((token, t) => {
  const bits = data.surprisal[t], share = bits === null ? 0 : Math.min(1, bits / 12);
  const text = data.texts[token] ?? "";
  const span = make("span", { style: `background:color-mix(in srgb, var(--c1) ${Math.round(65 * share)}%, transparent)`, tabindex: 0 },
    text.includes("\n") ? text.replace(/\n/g, "⏎\n") : text === "" ? "∅" : text);
  span.addEventListener("pointerenter", () => { if (!view.kept) { view.token = t; showToken(); } });
  span.addEventListener("focus", () => { view.token = t; showToken(); });
  span.addEventListener("click", () => { view.kept = !(view.kept && view.token === t); view.token = t; showToken(); });
  spans.push(span);
});
get("text").append(...spans);

const choice = (label, count) => {
  const select = make("select", { "aria-label": label }, Array.from({ length: count }, (_, n) => make("option", { value: n }, String(n + 1))));
  get("heads").append(make("label", {}, [label + " ", select]));
  return select;
};
const layerChoice = choice("layer", data.layers), headChoice = choice("head", data.heads);
layerChoice.addEventListener("change", () => { view.layer = +layerChoice.value; showHead(); });
headChoice.addEventListener("change", () => { view.head = +headChoice.value; showHead(); });

const matrix = get("matrix");
matrix.width = matrix.height = T;
matrix.addEventListener("pointermove", (event) => {
  const box = matrix.getBoundingClientRect();
  const s = Math.min(T - 1, Math.floor(((event.clientX - box.left) / box.width) * T));
  const t = Math.min(T - 1, Math.floor(((event.clientY - box.top) / box.height) * T));
  get("cell").textContent = `“${shown(data.tokens[t])}” (${t}) attends to “${shown(data.tokens[s])}” (${s}): ${percent(weight(view.layer, view.head, t, s))}`;
});
for (let layer = 0; layer < data.layers; layer++) {
  const row = make("div", { class: "heads" });
  for (let head = 0; head < data.heads; head++) {
    const canvas = make("canvas", { width: T, height: T, title: `layer ${layer + 1}, head ${head + 1}`, "data-layer": layer, "data-head": head });
    paint(canvas, layer, head);
    canvas.addEventListener("click", () => { [view.layer, view.head] = [layer, head]; showHead(); });
    row.append(canvas);
  }
  get("all").append(row);
}
showHead();
