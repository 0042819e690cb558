"use strict";
// Elements, and numbers as text. Children that are no elements become text: nothing here parses markup.

/** h("p", {class: "note", onclick: f}, "text", element): a new element. `style` takes an object; null is left out. */
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const byId = (id) => document.getElementById(id);

let lastId = 0;
const newId = (name) => `${name}-${++lastId}`;

/** A label and its control, which may be anything that takes an id. */
function labelled(text, control) {
  control.id ||= newId("control");
  return h("div", { class: "field" }, h("label", { for: control.id }, text), control);
}

/** A select of [value, text] pairs. */
function choice(pairs, value, onchange, attributes) {
  const options = pairs.map(([each, text]) =>
    h("option", { value: each, selected: String(each) === String(value) }, text),
  );
  return h("select", { ...attributes, onchange: (event) => onchange(event.target.value) }, options);
}

const NOTHING = "–";

/** 0.834, 12.3, 1,234. */
function figure(value, digits = 3) {
  if (value === null || value === undefined) return NOTHING;
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size >= 100) return value.toFixed(0);
  if (size >= 10) return value.toFixed(1);
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return value.toFixed(digits);
}

/** With so many decimals, whatever its size: numbers in a column line up. */
const fixed = (digits) => (value) =>
  value === null || value === undefined
    ? NOTHING
    : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

const percent = (value) => (value === null || value === undefined ? NOTHING : `${(100 * value).toFixed(1)} %`);

/** 0.4 ms, 37 ms, 2.3 s, 4.1 min, 2.5 h */
function duration(seconds) {
  if (seconds === null || seconds === undefined) return NOTHING;
  if (seconds === 0) return "0 s";
  if (seconds < 0.01) return `${(1000 * seconds).toPrecision(2)} ms`;
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 120) return `${seconds.toFixed(1)} s`;
  return seconds < 7200 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** Said by a screen reader. */
function say(text) {
  byId("said").textContent = text;
}
