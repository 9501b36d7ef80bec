"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// Makes an element. Text is only ever set as text, never parsed as HTML.
function make(tag, attributes = {}, children = []) {
  const drawn = ["svg", "g", "path", "line", "rect", "circle", "text", "title", "clipPath", "defs"].includes(tag);
  const element = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  for (const child of [children].flat()) element.append(child);
  return element;
}

function readable(value) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return +(value / 1e9).toPrecision(4) + " G";
  if (size >= 1e6) return +(value / 1e6).toPrecision(4) + " M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(4) + " k";
  if (size > 0 && size < 1e-3) return value.toExponential(2).replace("e-", "e−");
  return String(+value.toPrecision(4));
}
