"use strict";
// Curves over steps or over the time they took, every run in every chart.

const GROUPS = [
  [
    "Right answers for fewer calls",
    [
      {
        title: "EM",
        note: "right answers in the step's rollouts",
        y: (run) => metric(run, "reward/correct"),
        zero: true,
      },
      { title: "TC", note: "calls per trajectory", y: (run) => metric(run, "calls/well_formed"), zero: true },
      { title: "TP", note: "right answers per call", y: productivity, zero: true },
      {
        title: "Response tokens",
        note: "sampled per trajectory",
        y: (run) => metric(run, "rollout/sampled_tokens"),
        zero: true,
      },
      {
        title: "All tokens",
        note: "prompt and observations included",
        y: (run) => metric(run, "rollout/tokens"),
        zero: true,
      },
      { title: "Tool seconds", note: "per trajectory", y: toolSeconds, zero: true, format: duration },
      {
        title: "Wall clock",
        note: "seconds of a step",
        y: (run) => metric(run, "time/step_s"),
        zero: true,
        format: duration,
      },
      { title: "Tokens per second", note: "of a whole step", y: (run) => metric(run, "perf/tokens_per_s"), zero: true },
    ],
  ],
  ["Reward", rewardCharts],
  [
    "Is the update sound?",
    [
      {
        title: "KL",
        note: "nats per token, to the reference or else to the policy before the update",
        y: (run) => metric(run, "update/kl"),
      },
      { title: "Entropy", note: "nats per token", y: (run) => metric(run, "update/entropy"), zero: true },
      {
        title: "Mismatch",
        note: "mean |log-prob learner - sampler|, nats",
        y: (run) => metric(run, "rollout/logprob_gap_mean"),
        zero: true,
      },
      {
        title: "Sign reversals",
        note: "share of rewarded trajectories pushed down",
        y: (run) => metric(run, "reward/sign_reversals"),
        zero: true,
        format: percent,
      },
      {
        title: "Likelihood of correct trajectories",
        note: "mean log-prob of their tokens, nats",
        y: (run) => metric(run, "rollout/rewarded_logprob"),
      },
      {
        title: "Clipped",
        note: "share of tokens whose ratio was clipped",
        y: (run) => metric(run, "update/clip_fraction"),
        zero: true,
        format: percent,
      },
      { title: "Gradient norm", note: "of the policy", y: (run) => metric(run, "update/policy_grad_norm"), zero: true },
      {
        title: "Groups with a signal",
        note: "share whose rewards differ",
        y: (run) => metric(run, "reward/groups_with_signal"),
        zero: true,
        format: percent,
      },
    ],
  ],
];
const PHASES = ["rollout", "reward", "score", "transcripts", "update", "sync"];

function trainingPage(page) {
  const host = h("div", {});
  const state = { x: "step", smooth: 1, extra: [] };
  const draw = () => host.replaceChildren(...charts(state));
  const rest = otherMetrics();
  page.append(
    h("h2", {}, "Training"),
    h(
      "div",
      { class: "bar" },
      labelled(
        "Over",
        choice(
          [
            ["step", "steps"],
            ["minutes", "wall clock"],
          ],
          "step",
          (value) => ((state.x = value), draw()),
        ),
      ),
      labelled(
        "Smooth over",
        choice(
          [
            [1, "no steps"],
            [5, "5 steps"],
            [15, "15 steps"],
          ],
          1,
          (value) => ((state.smooth = +value), draw()),
        ),
      ),
      rest.length
        ? labelled(
            "Add a chart",
            choice(
              [["", "choose a metric"], ...rest.map((name) => [name, name])],
              "",
              (name) => name && (state.extra.unshift(name), draw()),
            ),
          )
        : null,
      h("p", { class: "hint" }, "Click a step, or press Enter in a chart, to see its trajectories."),
    ),
    host,
  );
  draw();
}

function charts(state) {
  const group = ([title, specs]) => [
    h("h3", { class: "group" }, title),
    h(
      "div",
      { class: "charts" },
      (typeof specs === "function" ? specs() : specs).map((spec) => runsChart(spec, state)),
    ),
  ];
  const extra = state.extra.map((name) => ({ title: name, y: (run) => metric(run, name) }));
  return [...(extra.length ? group(["Added", extra]) : []), ...GROUPS.flatMap(group), phases()];
}

function runsChart(spec, state) {
  const lines = report.runs.map((run, k) => {
    const y = smoothed(spec.y(run), state.smooth);
    const x = state.x === "step" ? metric(run, "step") : minutes(run);
    return { label: run.name, run: k, x: x.slice(0, y.length), y };
  });
  const pick = (x) => pickStep(state.x === "step" ? x : stepAt(lines, x));
  return chart(lines, { ...spec, x: state.x, sync: "training", pick: total ? pick : null });
}

/** One chart for each term that any run's reward logs. */
function rewardCharts() {
  const known = ["reward/correct", "reward/sign_reversals", "reward/groups_with_signal"];
  const names = [...new Set(report.runs.flatMap((run) => Object.keys(run.metrics)))];
  const terms = names.filter((name) => name.startsWith("reward/") && !known.includes(name));
  const title = (name) => (name === "reward/value" ? "Reward" : `Reward term: ${name.slice("reward/".length)}`);
  return terms.map((name) => ({
    title: title(name),
    note: "mean over trajectories",
    y: (run) => metric(run, name),
    zero: true,
  }));
}

function otherMetrics() {
  const names = new Set(report.runs.flatMap((run) => Object.keys(run.metrics)));
  names.delete("step");
  return [...names].filter((name) => !name.startsWith("eval/")).sort();
}

/** Total right / total calls of each step. */
function productivity(run) {
  const calls = metric(run, "calls/well_formed");
  return metric(run, "reward/correct").map((right, k) => (right === null || !calls[k] ? null : right / calls[k]));
}

/** As logged or, by an earlier otcrl, as the transcripts have it. */
function toolSeconds(run) {
  if (run.metrics["perf/tool_s"]) return metric(run, "perf/tool_s");
  const told = new Map(run.tools.steps.map((step, k) => [step, run.tools.seconds[k]]));
  return run.splits.training ? metric(run, "step").map((step) => told.get(step) ?? null) : [];
}

/** Time in training steps up to and with each. An evaluation after the last has none: it comes a moment later. */
function minutes(run) {
  let sum = 0;
  return metric(run, "step").map((_, k) => (sum += (metric(run, "time/step_s")[k] ?? 1e-4) / 60));
}

function smoothed(values, width) {
  if (width === 1) return values;
  return values.map((value, k) => {
    const near = values.slice(Math.max(0, k - width + 1), k + 1).filter((each) => each !== null);
    return value === null ? null : near.reduce((sum, each) => sum + each, 0) / near.length;
  });
}

function stepAt(lines, x) {
  const line = lines.find(({ x: xs }) => xs.includes(x));
  return metric(report.runs[line.run], "step")[line.x.indexOf(x)];
}

/** Where the time of a step goes, on average over the run. */
function phases() {
  const mean = (values) => {
    const there = values.filter((value) => value !== null);
    return there.length ? there.reduce((sum, value) => sum + value, 0) / there.length : null;
  };
  const rows = report.runs.map((run, k) => ({ run, k, mean: (name) => mean(metric(run, `time/${name}_s`)) }));
  const there = rows.filter((row) => row.mean("step") !== null);
  if (!there.length) return h("p", { class: "empty" }, "No training step has been logged yet.");
  const share = (row, name) =>
    h(
      "div",
      {},
      h("span", { class: "value" }, duration(row.mean(name))),
      h(
        "span",
        { class: "share", "aria-hidden": "true" },
        h("span", {
          style: { width: percent(Math.min((row.mean(name) ?? 0) / row.mean("step"), 1)).replace(" ", "") },
        }),
      ),
    );
  return table(
    there,
    [
      { label: "run", cell: (row) => named(row.run, row.k) },
      { label: "step", number: true, value: (row) => row.mean("step"), text: (row) => duration(row.mean("step")) },
      ...PHASES.filter((name) => there.some((row) => row.mean(name) !== null)).map((name) => ({
        label: name,
        number: true,
        value: (row) => row.mean(name),
        cell: (row) => share(row, name),
      })),
    ],
    { caption: "Where the time of a step goes, on average" },
  );
}
