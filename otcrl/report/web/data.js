"use strict";
// What the report knows. An index that is read at once; trajectories in compressed blocks that are opened when needed.

const report = JSON.parse(byId("index").textContent);
const columns = report.columns;
const total = columns.run.length; // trajectories that are shown
const blocks = document.getElementsByClassName("block");
const opened = new Map(); // number of a block -> promise of its trajectories

/** The text, tokens and calls of trajectory `i`. */
async function detail(i) {
  const number = Math.floor(i / report.block);
  if (!opened.has(number)) opened.set(number, unpack(blocks[number].textContent));
  return (await opened.get(number))[i % report.block];
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/** {id, source, text, answers} of the question of trajectory `i`. */
function question(i) {
  const [id, source, text, answers] = report.questions[columns.question[i]];
  return { id, source, text, answers };
}

const isVoid = (i) => columns.stop[i] === "void";
const isTraining = (i) => columns.split[i] === "training";

/** "training step 20", or the evaluation's name. */
const occasion = (i) => (isTraining(i) ? `step ${columns.step[i]}` : `evaluation ${columns.split[i]}`);

/** Trajectories of the same group, itself among them. */
function siblings(i) {
  const same = (j) => ["run", "split", "step", "group"].every((name) => columns[name][i] === columns[name][j]);
  const found = [];
  for (let j = i; j >= 0 && same(j); j--) found.unshift(j); // siblings lie together
  for (let j = i + 1; j < total && same(j); j++) found.push(j);
  return found;
}

/** Of these trajectories the right one with the fewest calls, then tokens; null when none is right. */
function cheapest(trajectories) {
  const right = trajectories.filter((j) => columns.right[j] && !isVoid(j));
  const cost = (j) => [columns.calls[j], columns.sampled[j] ?? 0];
  right.sort((a, b) => cost(a)[0] - cost(b)[0] || cost(a)[1] - cost(b)[1] || a - b);
  return right.length ? right[0] : null;
}

/** A metric of a run by its name, [] when it was not logged. */
const metric = (run, name) => run.metrics[name] ?? [];
