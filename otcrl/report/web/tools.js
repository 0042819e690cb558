"use strict";
// Latency and errors of the tools.

const OUTCOMES = {
  ok: "--class-1",
  model_error: "--class-3",
  invalid: "--class-4",
  over_budget: "--class-0",
  infra_error: "--class-5",
};

function toolsPage(page) {
  page.append(h("h2", {}, "Tools"));
  const rows = report.runs.flatMap((run, k) =>
    Object.entries(run.tools.tools).map(([name, tool]) => ({ run, k, name, tool, outcomes: run.tools.outcomes })),
  );
  if (!rows.length) return page.append(h("p", { class: "empty" }, "No call is in the transcripts."));
  const latency = (label) => ({
    label,
    number: true,
    value: (row) => row.tool.latency[label],
    text: (row) => duration(row.tool.latency[label]),
  });
  const outcome = (name) => ({
    label: name.replace("_", " "),
    number: true,
    value: (row) => row.tool.outcomes[row.outcomes.indexOf(name)],
    text: (row) => row.tool.outcomes[row.outcomes.indexOf(name)].toLocaleString("en"),
  });
  page.append(
    table(
      rows,
      [
        { label: "run", value: (row) => row.run.name, cell: (row) => named(row.run, row.k) },
        { label: "tool", value: (row) => row.name, text: (row) => row.name || "(malformed)" },
        {
          label: "calls",
          number: true,
          value: (row) => row.tool.calls,
          text: (row) => row.tool.calls.toLocaleString("en"),
        },
        ...report.runs[0].tools.outcomes.map(outcome),
        {
          label: "cached",
          number: true,
          value: (row) => row.tool.cached,
          text: (row) => row.tool.cached.toLocaleString("en"),
        },
        ...["p50", "p90", "p99", "max"].map(latency),
      ],
      { caption: "Calls in the transcripts. Latency is of calls that ran: not of those answered from the cache." },
    ),
    h("div", { class: "charts" }, rows.filter((row) => row.tool.histogram.length).map(histogram)),
    h("h3", { class: "group" }, "Over training"),
    h(
      "div",
      { class: "charts" },
      ["p50", "p90", "p99"].map((label) =>
        chart(
          report.runs.map((run, k) => ({ label: run.name, run: k, x: run.tools.steps, y: run.tools.latency[label] })),
          {
            title: `Latency, ${label}`,
            note: "seconds of a call, all tools",
            zero: true,
            format: duration,
            sync: "tools",
            pick: pickStep,
          },
        ),
      ),
      report.runs.map((run) =>
        chart(
          run.tools.outcomes
            .map((name, k) => ({
              label: name.replace("_", " "),
              x: run.tools.steps,
              y: run.tools.shares.map((row) => row[k]),
              colour: OUTCOMES[name],
            }))
            .filter((line) => line.y.some(Boolean)),
          { title: "What became of calls", note: run.name, stacked: true, format: percent, pick: pickStep },
        ),
      ),
    ),
    errorTable(),
  );
}

/** Calls by latency: bars of words and widths. */
function histogram({ run, name, tool }) {
  const most = Math.max(...tool.histogram.map(([, , count]) => count));
  const bar = ([from, to, count]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, `${duration(from)} to ${duration(to)}`),
      h("td", { class: "number" }, count.toLocaleString("en")),
      h(
        "td",
        { class: "fill" },
        h(
          "span",
          { class: "share", "aria-hidden": "true" },
          h("span", { style: { width: `${(100 * count) / most}%` } }),
        ),
      ),
    );
  return h(
    "figure",
    { class: "chart" },
    h("figcaption", {}, h("h3", {}, `Latency of ${name || "malformed calls"}`), note(run.name)),
    h("table", { class: "histogram" }, h("tbody", {}, tool.histogram.map(bar))),
  );
}

function errorTable() {
  const rows = report.runs.flatMap((run, k) =>
    run.tools.errors.map(([tool, outcome, message, times]) => ({ run, k, tool, outcome, message, times })),
  );
  if (!rows.length) return h("p", { class: "empty" }, "No call failed.");
  return table(
    rows,
    [
      { label: "times", number: true, value: (row) => row.times, text: (row) => row.times.toLocaleString("en") },
      { label: "run", value: (row) => row.run.name, cell: (row) => named(row.run, row.k) },
      { label: "tool", value: (row) => row.tool, text: (row) => row.tool || "(malformed)" },
      { label: "outcome", value: (row) => row.outcome, text: (row) => row.outcome.replace("_", " ") },
      { label: "what it said", cell: (row) => h("code", { class: "message" }, row.message) },
    ],
    { caption: "What went wrong, most often first", sort: 0, down: true, page: 10 },
  );
}
