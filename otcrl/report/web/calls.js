"use strict";
// Calls against n, the fewest that are known to suffice for a question; and offloading over training.

const SHARES = { zero: true, format: percent };

function callsPage(page) {
  const host = h("div", {});
  const runs = report.runs.map((run, k) => [k, run.name]).filter(([k]) => report.runs[k].calls.steps.length);
  page.append(
    h("h2", {}, "Calls"),
    h(
      "p",
      { class: "lead" },
      "n is the fewest calls that suffice for a question: known of the task, or else the fewest of any right answer seen in the run.",
    ),
  );
  if (!runs.length)
    return page.append(
      h("p", { class: "empty" }, "No training transcripts: loop.transcripts_every says how often they are written."),
    );
  const show = (k) => host.replaceChildren(...callsOf(report.runs[k], +k));
  page.append(
    ...(runs.length > 1 ? [h("div", { class: "bar" }, labelled("Run", choice(runs, runs[0][0], show)))] : []),
    host,
    offloadingCharts(),
  );
  show(runs[0][0]);
}

function offloadingCharts() {
  const lines = (name) =>
    report.runs.map((run, k) => ({ label: run.name, run: k, x: run.offloading.steps, y: run.offloading[name] }));
  const pick = total ? pickStep : null;
  return h(
    "div",
    {},
    h("h3", { class: "group" }, "Offloading over training"),
    h(
      "div",
      { class: "charts" },
      chart(lines("known"), {
        ...SHARES,
        title: "Known",
        note: "a right answer without a call has been seen",
        sync: "offloading",
        pick,
      }),
      chart(lines("over_call"), {
        ...SHARES,
        title: "Over-call",
        note: "called all the same, of those",
        sync: "offloading",
        pick,
      }),
      chart(lines("wrong_without_call"), {
        ...SHARES,
        title: "Wrong without a call",
        note: "of all",
        sync: "offloading",
        pick,
      }),
      chart(lines("under_call"), {
        ...SHARES,
        title: "Under-call",
        note: "a sibling that called was right, of those",
        sync: "offloading",
        pick,
      }),
    ),
  );
}

function callsOf(run, k) {
  const { steps, classes, shares, tables } = run.calls;
  const lines = classes.map((label, place) => ({
    label,
    x: steps,
    y: shares.map((row) => row[place]),
    colour: `--class-${place}`,
  }));
  const [from, to] = [h("div", {}), h("div", {})];
  const pairs = steps.map((step, place) => [place, `step ${step}`]);
  const show = (host) => (place) => host.replaceChildren(crossing(tables[place]));
  show(from)(0);
  show(to)(steps.length - 1);
  return [
    h("h3", { class: "group" }, `Calls against n: ${run.name}`),
    chart(
      lines.filter((line) => line.y.some(Boolean)),
      { title: "Share of trajectories", note: "by calls made", stacked: true, format: percent, pick: pickStep },
    ),
    h(
      "div",
      { class: "two" },
      h("div", {}, labelled("Step", choice(pairs, 0, show(from))), from),
      h("div", {}, labelled("Step", choice(pairs, steps.length - 1, show(to))), to),
    ),
    questionTable(run, k),
  ];
}

/** How many attempts at questions of each n (rows) made m calls (columns); the diagonal is the optimum. */
function crossing(pairs) {
  if (!pairs.length) return h("p", { class: "empty" }, "No question of this step has been answered right.");
  const calls = [...Array(most(pairs.flatMap(([n, m]) => [n, m])) + 1).keys()];
  const counts = new Map(pairs.map(([n, m, count]) => [`${n} ${m}`, count]));
  const rows = [...new Set(pairs.map(([n]) => n))].map((n) => ({
    n,
    all: pairs.filter(([each]) => each === n).reduce((sum, [, , count]) => sum + count, 0),
  }));
  const shade = ({ n, all }, m) => {
    const count = counts.get(`${n} ${m}`) ?? 0;
    return h("span", { class: n === m ? "cross optimum" : "cross", style: { "--share": count / all } }, count || "·");
  };
  return table(
    rows,
    [
      { label: "n", text: ({ n }) => String(n) },
      ...calls.map((m) => ({ label: plural(m, "call"), number: true, cell: (row) => shade(row, m) })),
    ],
    { caption: "Attempts at questions that need n calls, by calls made; boxed: as many as needed" },
  );
}

function questionTable(run, k) {
  const texts = new Map(report.questions.map(([id, , text]) => [id, text])); // of those that are in this file
  const open = (id) =>
    h(
      "button",
      {
        type: "button",
        class: "link",
        onclick: () => go("trajectories", { q: id, run: report.runs.length > 1 ? k : null, split: "training" }),
      },
      texts.get(id),
    );
  const isAskedAgain = run.questions.some((row) => row[6] !== row[5] || row[7] !== row[5]);
  const mean = (place) => ({ number: true, value: (row) => row[place], text: (row) => figure(row[place], 2) });
  return table(
    run.questions,
    [
      {
        label: "question",
        value: (row) => texts.get(row[0]) ?? row[0],
        cell: (row) => (texts.has(row[0]) ? open(row[0]) : row[0]),
      },
      { label: "data set", value: (row) => row[1], text: (row) => row[1] },
      { label: "n", number: true, value: (row) => row[2], text: (row) => row[2] ?? NOTHING },
      { label: "attempts", number: true, value: (row) => row[3], text: (row) => String(row[3]) },
      { label: "right", number: true, value: (row) => row[4], text: (row) => percent(row[4]) },
      { label: "calls", ...mean(5), title: "on average" },
      {
        label: "over n",
        number: true,
        value: (row) => (row[2] === null ? null : row[5] - row[2]),
        text: (row) => (row[2] === null ? NOTHING : figure(row[5] - row[2], 2)),
      },
      ...(isAskedAgain
        ? [
            { label: "first step", ...mean(6), title: "calls on average in the first step that asked it" },
            { label: "last step", ...mean(7), title: "and in the last" },
          ]
        : []),
    ],
    { caption: "By question", sort: 6, down: true, page: 15 },
  );
}
