"use strict";
// All trajectories: filter, search, open. The filters are in the address, so a view can be kept and passed on.

const SORTS = {
  "": ["as they came", null],
  calls: ["most calls", (i) => -columns.calls[i]],
  fewest: ["fewest calls", (i) => columns.calls[i]],
  reward: ["highest reward", (i) => -(columns.reward[i] ?? -Infinity)],
  lowest: ["lowest reward", (i) => columns.reward[i] ?? Infinity],
  tokens: ["most tokens", (i) => -(columns.sampled[i] ?? 0)],
};

function viewerPage(page, state) {
  if (!total)
    return page.append(
      h("h2", {}, "Trajectories"),
      h("p", { class: "empty" }, "No transcripts: loop.transcripts_every says how often they are written."),
    );
  const side = h("div", { class: "side" });
  const count = h("p", { class: "count", role: "status" });
  const list = virtualList("Trajectories", listRow, (i, isClick) => {
    state.at = i;
    keep("trajectories", state);
    show();
    if (isClick && side.offsetLeft < 100) side.scrollIntoView(); // it stands below the list
  });
  const show = latest(async () => {
    side.setAttribute("aria-busy", "true");
    const content =
      state.at === undefined
        ? [h("p", { class: "empty" }, "No trajectory fits.")]
        : await sideContent(+state.at, state, (changes) => {
            Object.assign(state, changes);
            keep("trajectories", state);
            show();
          });
    return () => {
      side.replaceChildren(...content);
      side.removeAttribute("aria-busy");
    };
  });
  const search = () => {
    const found = matching(state);
    count.textContent = `${found.length.toLocaleString("en")} of ${plural(total, "trajectory").replace("trajectorys", "trajectories")}${report.leftOut ? ` (${report.leftOut.toLocaleString("en")} are not in this file)` : ""}`;
    const selected = found.includes(+state.at) ? +state.at : found[0];
    state.at = selected;
    list.show(found, selected);
    if (selected === undefined) show();
    keep("trajectories", state);
  };
  page.append(
    h("h2", {}, "Trajectories"),
    filters(state, search),
    h("div", { class: "viewer" }, h("div", { class: "left" }, count, list.element), side),
  );
  search();
}

/** Runs the last of several calls to its end: what an earlier one has found by then is not shown. */
function latest(work) {
  let number = 0;
  return async () => {
    const own = ++number;
    const finish = await work();
    if (own === number) finish();
  };
}

function filters(state, search) {
  const set = (name) => (value) => {
    if (value === "" || value === null) delete state[name];
    else state[name] = value;
    search();
  };
  const select = (name, label, pairs, any = "any") =>
    pairs.length > 1 ? labelled(label, choice([["", any], ...pairs], state[name] ?? "", set(name))) : null;
  const number = (name, label, hint, step) =>
    h("input", {
      type: "number",
      step,
      value: state[name] ?? null,
      placeholder: hint,
      "aria-label": label,
      oninput: (event) => set(name)(event.target.value),
    });
  const unique = (name) => [...new Set(columns[name])];
  const extent = (values) =>
    values
      .filter((value) => value !== null)
      .reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  const [steps, calls, rewards] = [
    extent(columns.step.filter((_, i) => isTraining(i))),
    extent(columns.calls),
    extent(columns.reward),
  ];
  const sources = [...new Set(report.questions.map(([, source]) => source))];
  const stops = unique("stop").map((stop) => [stop, `ended: ${stop.replace("_", " ")}`]);
  const range = (label, [from, to], [low, high], step) =>
    h(
      "fieldset",
      { class: "field" },
      h("legend", {}, label),
      h(
        "div",
        { class: "range" },
        number(from, `${label} from`, axisText(low), step),
        "to",
        number(to, `${label} to`, axisText(high), step),
      ),
    );
  const isUsed = Object.keys(state).some((name) => !["at", "q", "beside"].includes(name));
  return h(
    "form",
    { class: "bar", role: "search", onsubmit: (event) => event.preventDefault() },
    labelled(
      "Search",
      h("input", {
        type: "search",
        value: state.q ?? null,
        placeholder: "question or id",
        oninput: (event) => set("q")(event.target.value),
      }),
    ),
    h(
      "details",
      { open: isUsed || innerWidth > 700, class: "filters" },
      h("summary", {}, "Filters"),
      h(
        "div",
        { class: "bar" },
        select(
          "run",
          "Run",
          report.runs.map((run, k) => [k, run.name]),
        ),
        select(
          "split",
          "From",
          unique("split").map((split) => [split, split === "training" ? "training" : `evaluation ${split}`]),
        ),
        select(
          "source",
          "Data set",
          sources.map((name) => [name, name]),
        ),
        labelled(
          "Outcome",
          choice([["", "any"], ["right", "right"], ["wrong", "wrong"], ...stops], state.outcome ?? "", set("outcome")),
        ),
        steps[0] < steps[1] ? range("Step", ["from", "to"], steps) : null,
        range("Calls", ["callsmin", "callsmax"], calls),
        rewards[0] < rewards[1] ? range("Reward", ["rewardmin", "rewardmax"], rewards, "any") : null,
        labelled(
          "Sort",
          choice(
            Object.entries(SORTS).map(([name, [label]]) => [name, label]),
            state.sort ?? "",
            set("sort"),
          ),
        ),
        labelled("Tint tokens by", choice(TINTS, tint, setTint)),
      ),
    ),
  );
}

/** The trajectories that the filters leave. */
function matching(state) {
  const words = (state.q ?? "").toLowerCase();
  const asked = report.questions.map(
    ([id, source, text]) =>
      (!words || `${id} ${text}`.toLowerCase().includes(words)) && (!state.source || source === state.source),
  );
  const within = (value, low, high) =>
    (low === undefined && high === undefined) ||
    (value !== null && value >= (low ?? -Infinity) && value <= (high ?? Infinity));
  const outcome =
    { right: (i) => columns.right[i] && !isVoid(i), wrong: (i) => !columns.right[i] && !isVoid(i) }[state.outcome] ??
    ((i) => !state.outcome || columns.stop[i] === state.outcome);
  const found = [];
  for (let i = 0; i < total; i++) {
    const fits =
      asked[columns.question[i]] &&
      (state.run === undefined || columns.run[i] === +state.run) &&
      (state.split === undefined || columns.split[i] === state.split) &&
      within(isTraining(i) ? columns.step[i] : null, state.from, state.to) &&
      within(columns.calls[i], state.callsmin, state.callsmax) &&
      within(columns.reward[i], state.rewardmin, state.rewardmax) &&
      outcome(i);
    if (fits) found.push(i);
  }
  const order = SORTS[state.sort ?? ""]?.[1];
  return order ? found.sort((a, b) => order(a) - order(b) || a - b) : found;
}

function listRow(i) {
  const reward = columns.reward[i] === null ? null : `reward ${figure(columns.reward[i])}`;
  return [
    h("span", { class: "asked" }, question(i).text),
    h(
      "span",
      { class: "line" },
      outcomeMark(i),
      h("span", {}, plural(columns.calls[i], "call")),
      reward && h("span", {}, reward),
      report.runs.length > 1 ? key(columns.run[i]) : null,
      h("span", { class: "when" }, occasion(i)),
    ),
  ];
}

async function sideContent(i, state, change) {
  const group = siblings(i);
  const best = cheapest(group);
  const others =
    group.length > 1
      ? h(
          "div",
          { class: "group", role: "group", "aria-label": "Attempts at the same question" },
          group.map((j) =>
            h(
              "button",
              {
                type: "button",
                class: "chip",
                "aria-pressed": String(j === i),
                "aria-label": `${columns.right[j] ? "right" : "wrong"}, ${plural(columns.calls[j], "call")}`,
                onclick: () => change({ at: j }),
              },
              outcomeGlyph(j),
              ` ${columns.calls[j]}`,
            ),
          ),
        )
      : null;
  const toggle = h(
    "button",
    {
      type: "button",
      "aria-pressed": String(Boolean(state.beside)),
      disabled: best === null || best === i,
      onclick: () => change({ beside: state.beside ? undefined : 1 }),
    },
    best === null
      ? "No sibling is right"
      : best === i
        ? "The cheapest right one of its group"
        : "Beside the cheapest right sibling",
  );
  const isBeside = state.beside && best !== null && best !== i;
  const panes = isBeside
    ? await Promise.all([pane(i, "This one"), pane(best, "Cheapest right sibling")])
    : [await pane(i)];
  return [
    group.length > 1
      ? h(
          "div",
          { class: "bar" },
          h("span", { class: "hint" }, `${group.length} attempts, calls made:`),
          others,
          toggle,
        )
      : null,
    h("div", { class: isBeside ? "panes two" : "panes" }, panes),
  ].filter(Boolean);
}

function outcomeGlyph(i) {
  const [glyph, word] = isVoid(i) ? ["∅", "void"] : columns.right[i] ? ["✓", "right"] : ["✗", "wrong"];
  return h("span", { class: `mark ${word}`, "aria-hidden": "true" }, glyph);
}

/** The trajectories of a training step, or of the nearest that has any. */
function pickStep(x) {
  const steps = [...new Set(columns.step.filter((_, i) => isTraining(i)))];
  if (!steps.length) return;
  const nearest = steps.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
  go("trajectories", { split: "training", from: nearest, to: nearest });
}
