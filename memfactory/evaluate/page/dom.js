"use strict";
// Text of models and datasets reaches the page only through text nodes (see `el`), never as HTML.

const byId = (id) => document.getElementById(id);

/** An HTML element; strings among `children` become text nodes. */
function el(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** An SVG element with attributes. */
function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const show = {
  percent: (value) => `${(value * 100).toFixed(1)} %`,
  seconds: (value) => `${value.toFixed(value < 10 ? 2 : 1)} s`,
  number(value) {
    if (value === 0 || Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    if (size < 0.001 || size >= 1e6) return value.toExponential(1);
    return size < 1 ? value.toFixed(3) : size < 100 ? value.toFixed(2) : value.toFixed(0);
  },
  /** For round numbers: no zeros at the end. */
  short: (value) => (value !== 0 && Math.abs(value) < 0.001 ? value.toExponential() : Number(value.toPrecision(6)).toLocaleString("en")),
};
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + show.number(Math.abs(value));

/** About `count` round numbers that span low..high. */
function ticks(low, high, count, whole = false) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)) + 0); // + 0: no -0
  return found;
}
