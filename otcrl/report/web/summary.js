"use strict";
// The first page: what the runs are, how they were evaluated, in what they differ.

const EVALUATED = [
  ["em", "EM", "right answers, of all questions"],
  ["f1", "F1", "overlap of words with the gold answer"],
  ["tc", "TC", "tool calls per question"],
  ["tp", "TP", "tool productivity: right answers per call"],
  ["optimum", "best TC", "fewest calls that suffice, where that is known"],
  ["over_call", "too many", "attempts with more calls than that", percent],
  ["under_call", "too few", "attempts with fewer", percent],
  ["sampled_tokens", "tokens", "sampled per attempt", fixed(1)],
];
const OFFLOADING = [
  ["right_closed", "right with tools off"],
  ["over_call", "called all the same, of those"],
  ["wrong_without_call", "wrong, and no call made"],
  ["under_call", "a call would have helped, of those"],
];

function summaryPage(page) {
  page.append(
    h("h2", {}, "Summary"),
    table(
      report.runs.map((run, k) => ({ run, k })),
      runColumns(),
      { caption: "Runs" },
    ),
    ...evaluationTables(),
    ...differences(),
    h("h3", {}, "Settings"),
    ...report.runs.map((run) =>
      h("details", {}, h("summary", {}, run.name), h("pre", { tabindex: 0 }, run.config || "no config.yaml")),
    ),
  );
}

const named = (run, k) => h("span", { class: "run" }, key(k), " ", h("span", { class: "of" }, run.name));

function runColumns() {
  const seconds = (run) => metric(run, "time/step_s").reduce((sum, value) => sum + (value ?? 0), 0);
  const done = (run) => metric(run, "time/step_s").filter((value) => value !== null).length;
  const about = ["task", "model", "algo", "reward", "engine", "seed"].filter((name) =>
    report.runs.some((run) => run.about[name]),
  );
  return [
    { label: "run", cell: ({ run, k }) => named(run, k) },
    ...about.map((name) => ({ label: name, text: ({ run }) => run.about[name] ?? NOTHING })),
    {
      label: "steps",
      number: true,
      text: ({ run }) =>
        run.steps === null || run.steps === done(run) ? String(done(run)) : `${done(run)} of ${run.steps}`,
    },
    { label: "time", number: true, title: "spent in training steps", text: ({ run }) => duration(seconds(run)) },
    {
      label: "trajectories",
      number: true,
      title: "in the transcripts",
      text: ({ run }) =>
        Object.values(run.splits)
          .reduce((a, b) => a + b, 0)
          .toLocaleString("en"),
    },
  ];
}

function evaluationTables() {
  const rows = report.runs.flatMap((run, k) => run.evaluations.map((evaluation) => ({ run, k, evaluation })));
  if (!rows.length) return [h("p", { class: "empty" }, "No evaluation has been made yet.")];
  const host = h("div", {});
  const names = (kind) => [...new Set(rows.flatMap((row) => Object.keys(row.evaluation[kind])))];
  const sources = [
    ...names("sources").map((name) => [name, name]),
    ...names("averages").map((name) => [name, `mean of data sets: ${name}`]),
  ];
  const show = (source) => host.replaceChildren(evaluations(rows, source));
  show("");
  const chooser =
    sources.length > 1
      ? h("div", { class: "bar" }, labelled("Data set", choice([["", "all together"], ...sources], "", show)))
      : null;
  return [h("h3", {}, "Evaluations"), chooser, host, ...offloadingTables(rows)].filter((each) => each !== null);
}

function evaluations(rows, source) {
  const within = ({ overall, sources, averages }) => (source ? (sources[source] ?? averages[source]) : overall);
  const of = (row) => within(row.evaluation); // of several data sets' average: `sets`, and the first four figures
  const there = rows.filter((row) => of(row));
  const value = (name) => (row) => of(row)[name]?.value ?? null;
  const present = EVALUATED.filter(([name]) => there.some((row) => value(name)(row) !== null));
  const counter = [...new Set(there.map((row) => row.evaluation.counter))].join(", ");
  return table(
    there,
    [
      { label: "run", value: (row) => row.run.name, cell: (row) => named(row.run, row.k) },
      { label: "evaluation", value: (row) => row.evaluation.name, text: (row) => row.evaluation.name },
      {
        label: "n",
        number: true,
        title: "questions",
        text: (row) => (of(row).questions ?? plural(of(row).sets, "set")).toLocaleString("en"),
      },
      ...present.map(([name, label, title, form]) => ({
        label,
        title,
        number: true,
        value: value(name),
        cell: (row) =>
          form || name === "optimum"
            ? (form ?? figure)(value(name)(row))
            : interval(of(row)[name], reach(there.map(of), name), row.k, name),
      })),
      {
        label: "void",
        number: true,
        title: "attempts that infrastructure spoilt",
        text: (row) => String(of(row).void ?? NOTHING),
      },
    ],
    { caption: `Evaluations with 95 % bootstrap intervals over questions. Calls that count: ${counter}.` },
  );
}

/** From 0 to the highest end of an interval in the column. */
const reach = (summaries, name) => Math.max(...summaries.map((summary) => summary[name].high ?? 0), 1e-9);

/** The figure, its interval, and both drawn on the scale of the column. */
function interval(estimate, end, run, name) {
  if (estimate.value === null) return name === "tp" ? "no calls" : NOTHING;
  const at = (value) => `${(100 * value) / end}%`;
  const bar = h(
    "div",
    { class: "interval", "aria-hidden": "true", style: { color: `var(--run-${run % 6})` } },
    h("span", {
      class: "reach",
      style: { left: at(estimate.low), width: `${(100 * (estimate.high - estimate.low)) / end}%` },
    }),
    h("span", { class: "tick", style: { left: at(estimate.value) } }),
  );
  return [
    h("div", { class: "value" }, figure(estimate.value)),
    h("div", { class: "limits" }, `${figure(estimate.low)} to ${figure(estimate.high)}`),
    bar,
  ];
}

function offloadingTables(rows) {
  const measured = rows.filter((row) => row.evaluation.offloading);
  if (!measured.length) return [];
  const column = ([name, label]) => ({
    label,
    number: true,
    value: (row) => row.evaluation.offloading[name].value,
    cell: (row) => interval(row.evaluation.offloading[name], 1, row.k, name),
  });
  return [
    table(
      measured,
      [
        { label: "run", cell: (row) => named(row.run, row.k) },
        { label: "evaluation", text: (row) => row.evaluation.name },
        ...OFFLOADING.map(column),
      ],
      {
        caption: "Cognitive offloading: calls for what the policy knows, and guesses at what a call would have told it",
      },
    ),
  ];
}

function differences() {
  if (!report.differences.length) return [];
  return [
    table(
      report.differences,
      [
        { label: "setting", text: (row) => row[0] },
        ...report.runs.map((run, k) => ({ label: run.name, text: (row) => row[k + 1] ?? NOTHING })),
      ],
      { caption: "Settings that differ", page: 12 },
    ),
  ];
}
