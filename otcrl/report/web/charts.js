"use strict";
// Plots, by uPlot. A chart is told apart by colour and dashes, can be read with the arrow keys, and says its numbers.

const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [4, 2], [12, 4]];
const HEIGHT = 170;
const WHOLE = [1, 10, 100, 1000, 10000].flatMap((power) => [power, 2 * power, 5 * power]); // between the ticks of steps
const drawn = new Set(); // of the page that is shown, to be drawn anew when light turns to dark

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const runColour = (run) => css(`--run-${run % 6}`);
const runDash = (run) => DASHES[run % DASHES.length];

/** A short piece of a line as charts draw it: the key of a run. */
function key(run) {
  const canvas = h("canvas", { width: 44, height: 4, class: "key", "aria-hidden": "true" });
  const draw = () => {
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, 44, 4);
    pen.strokeStyle = runColour(run);
    pen.lineWidth = 4;
    pen.setLineDash(runDash(run).map((length) => 2 * length));
    pen.beginPath();
    pen.moveTo(0, 2);
    pen.lineTo(44, 2);
    pen.stroke();
  };
  draw();
  drawn.add({ redraw: draw, host: canvas });
  return canvas;
}

/**
 * A card with a chart. `lines`: [{label, x, y, run, colour, dash}], x ascending.
 * options: title, note, format (of a value), x (name of the axis), zero (the axis begins at 0), stacked (shares, as
 * areas from the first up), sync (charts that share a cursor), pick (called with the x that was clicked on).
 */
function chart(lines, options) {
  const plot = h("div", { class: "plot", tabindex: 0, role: "img" });
  const shown = lines.filter((line) => line.y.some((value) => value !== null && value !== undefined));
  const legend = legendOf(shown, options);
  const title = h("figcaption", {}, h("h3", {}, options.title), legend.at, note(options.note));
  const card = h("figure", { class: "chart" }, title, legend.values, plot);
  if (!shown.length) {
    plot.replaceWith(h("p", { class: "empty" }, "not logged"));
    return card;
  }
  plot.setAttribute("aria-label", inWords(shown, options));
  const aligned = uPlot.join(shown.map((line) => [line.x, line.y]));
  const tell = (place) => legend.tell(aligned, place);
  let drawing = null;
  const draw = () => {
    drawing?.destroy();
    drawing = new uPlot(
      settings(shown, options, widthOf(plot), tell),
      options.stacked ? stacked(aligned) : aligned,
      plot,
    );
  };
  const resize = () => (drawing ? drawing.setSize({ width: widthOf(plot), height: HEIGHT }) : draw());
  new ResizeObserver(() => plot.isConnected && plot.clientWidth && resize()).observe(plot);
  drawn.add({ redraw: () => drawing && draw(), host: plot });
  tell(null);
  listen(
    plot,
    () => drawing,
    aligned[0],
    options,
    () => say(legend.said()),
  );
  return card;
}

const widthOf = (plot) => Math.max(plot.clientWidth, 120);

/** What the lines are called and their values where the cursor is, or else the last ones. */
function legendOf(lines, options) {
  const at = h("span", { class: "at" });
  const cells = lines.map(() => h("dd", {}));
  const mark = (line) => (line.run === undefined ? swatch(line) : key(line.run));
  const entry = (line, k) => h("div", {}, h("dt", {}, mark(line), h("span", { class: "of" }, line.label)), cells[k]);
  const tell = (aligned, place) => {
    cells.forEach((cell, k) => (cell.textContent = (options.format ?? figure)(valueAt(aligned, k + 1, place))));
    at.textContent = place === null || place === undefined ? "" : whereText(aligned[0][place], options);
  };
  const said = () => `${at.textContent}: ${lines.map((line, k) => `${line.label} ${cells[k].textContent}`).join(", ")}`;
  return { at, values: h("dl", { class: "values" }, lines.map(entry)), tell, said };
}

const whereText = (x, options) => (options.x === "minutes" ? `minute ${x.toFixed(1)}` : `step ${x}`);

/** Arrow keys move the cursor; a click or Enter picks where it is. */
function listen(plot, drawing, xs, options, moved) {
  const place = () => drawing()?.cursor.idx ?? null;
  const pick = () => options.pick && place() !== null && options.pick(xs[place()]);
  plot.addEventListener("click", pick);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Enter") pick();
    if (!step || !drawing()) return;
    event.preventDefault();
    const next = Math.min(Math.max((place() ?? xs.length - 1) + step, 0), xs.length - 1);
    drawing().setCursor({ left: drawing().valToPos(xs[next], "x"), top: HEIGHT / 2 });
    moved();
  });
}

const note = (text) => (text ? h("p", { class: "note" }, text) : null);

function swatch(line) {
  return h("span", { class: "swatch", style: { background: css(line.colour) } });
}

/** The value at a place or, of `null` and of steps that were not logged, the last one before it. */
function valueAt(aligned, column, place) {
  for (let k = place ?? aligned[0].length - 1; k >= 0; k--) {
    if (aligned[column][k] !== null && aligned[column][k] !== undefined) return aligned[column][k];
  }
  return null;
}

function settings(lines, options, width, tell) {
  const grid = { stroke: css("--grid"), width: 1 };
  const axis = { stroke: css("--muted"), font: "11px system-ui, sans-serif", grid, ticks: { show: false }, gap: 4 };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    padding: [8, 10, 0, 0],
    scales: {
      x: { time: false, range: options.stacked ? aroundBars : undefined },
      y: { range: options.stacked ? [0, 1] : (_, low, high) => limits(low, high, options.zero) },
    },
    axes: [
      {
        ...axis,
        size: 26,
        space: 60,
        incrs: options.x === "minutes" ? undefined : WHOLE,
        splits: options.stacked ? someSteps : undefined,
      },
      {
        ...axis,
        size: 46,
        space: 34,
        values: (_, ticks) => ticks.map(options.format === percent ? percentText : axisText),
      },
    ],
    cursor: {
      y: false,
      drag: { x: false, y: false },
      points: { size: 6 },
      sync: options.sync ? { key: options.sync, setSeries: false } : undefined,
    },
    series: [{}, ...(options.stacked ? lines.map(area).reverse() : lines.map(stroke))],
    hooks: { setCursor: [(plot) => tell(plot.cursor.idx)] },
  };
}

const stroke = (line) => ({
  stroke: line.run === undefined ? css(line.colour) : runColour(line.run),
  dash: line.run === undefined ? line.dash : runDash(line.run),
  width: 1.75,
  spanGaps: true,
  points: { show: line.x.length < 40, size: 4, fill: line.run === undefined ? css(line.colour) : runColour(line.run) },
});

const area = (line) => ({
  fill: css(line.colour),
  stroke: css("--panel"),
  width: 1,
  paths: uPlot.paths.bars({ size: [0.8, 60], align: 0 }),
  points: { show: false },
});

/** Sums from the first line up, the highest first, so that each covers what lies below it. */
function stacked(aligned) {
  const [x, ...ys] = aligned;
  const sums = [];
  ys.forEach((y, k) => sums.push(y.map((value, i) => (value ?? 0) + (k ? sums[k - 1][i] : 0))));
  return [x, ...sums.reverse()];
}

function limits(low, high, zero) {
  if (low === null || high === null) return [0, 1];
  const from = zero && low >= 0 ? 0 : low;
  const room = (high - from || Math.abs(high) || 1) * 0.06;
  return [from === 0 && zero ? 0 : from - room, high + room];
}

/** As Math.min and Math.max, which take no more than some 100,000 numbers. */
const least = (numbers) => numbers.reduce((a, b) => Math.min(a, b), Infinity);
const most = (numbers) => numbers.reduce((a, b) => Math.max(a, b), -Infinity);

/** Room for half a bar at either end. */
function aroundBars(plot, low, high) {
  const steps = plot.data[0];
  const room = steps.length > 1 ? least(steps.slice(1).map((step, k) => step - steps[k])) / 2 : 1;
  return [low - room, high + room];
}

/** The steps that have a bar, or as many of them as there is room to name. */
function someSteps(plot) {
  const each = Math.ceil((plot.data[0].length * 40) / plot.width);
  return plot.data[0].filter((_, k) => k % each === 0);
}

const percentText = (value) => `${+(100 * value).toPrecision(3)} %`;

function axisText(value) {
  const size = Math.abs(value);
  if (size >= 1000) return `${+(value / 1000).toPrecision(3)}k`;
  if (size !== 0 && size < 0.001) return value.toExponential(0);
  return String(+value.toPrecision(3));
}

function inWords(lines, options) {
  const format = options.format ?? figure;
  const said = lines.map((line) => {
    const numbers = line.y.filter((value) => value !== null && value !== undefined);
    return `${line.label} from ${format(numbers[0])} to ${format(numbers.at(-1))}, lowest ${format(least(numbers))}, highest ${format(most(numbers))}`;
  });
  return `${options.title} by ${options.x ?? "step"}. ${said.join("; ")}. Arrow keys read it.`;
}

/** What is on the page again, in the colours of now. */
function redrawAll() {
  for (const each of drawn) {
    if (!each.host.isConnected) drawn.delete(each);
    else each.redraw();
  }
}
