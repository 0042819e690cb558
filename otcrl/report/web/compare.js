"use strict";
// The case study: the same question on two occasions, in two runs or at two steps.

/** Pairs of occasions with a question in common. Of those at one question, each with the next: all would be millions. */
function sharing(occasions) {
  const asked = new Map();
  occasions.forEach(({ best }, k) => {
    for (const name of best.keys()) asked.has(name) ? asked.get(name).push(k) : asked.set(name, [k]);
  });
  const pairs = new Map();
  const evaluated = occasions.flatMap(({ split }, k) => (split === "training" ? [] : [k]));
  const share = (a, b) => [...occasions[a].best.keys()].some((name) => occasions[b].best.has(name));
  for (const a of evaluated)
    for (const b of evaluated) if (a < b && share(a, b)) pairs.set(`${a} ${b}`, [a, b]);
  for (const places of asked.values())
    places.slice(1).forEach((b, k) => pairs.set(`${places[k]} ${b}`, [places[k], b]));
  return [...pairs.values()].toSorted(([a, b], [c, d]) => a - c || b - d);
}

function comparePage(page, state) {
  const occasions = allOccasions();
  page.append(
    h("h2", {}, "Compare"),
    h(
      "p",
      { class: "lead" },
      "The same question on two occasions, each with its cheapest right attempt, or its first if none is right.",
    ),
  );
  const pairs = sharing(occasions);
  if (!pairs.length) return page.append(h("p", { class: "empty" }, "No question was asked on two occasions."));
  const is = (k, split, run) => occasions[k].split === split && (run === undefined || occasions[k].run === run);
  const first =
    pairs.find(([a, b]) => is(a, "before") && is(b, "after", occasions[a].run)) ??
    pairs.find(([a, b]) => is(a, "after") && is(b, "after")) ??
    pairs.at(-1);
  state.a ??= first[0];
  state.b ??= first[1];
  const [list, panes] = [h("div", {}), h("div", { class: "panes two" })];
  const options = occasions.map(({ label }, k) => [k, label]);
  const set = (name) => (value) => {
    state[name] = +value;
    delete state.question;
    draw();
  };
  const draw = () => {
    const rows = comparison(occasions[state.a], occasions[state.b]);
    keep("compare", state);
    list.replaceChildren(
      rows.length
        ? comparisonTable(rows, occasions[state.a], occasions[state.b], choose)
        : h("p", { class: "empty" }, "These two share no question."),
    );
    panes.replaceChildren();
    if (rows.length)
      choose(rows.find((row) => row.question === +state.question) ?? rows.toSorted((a, b) => b.saved - a.saved)[0]);
  };
  const choose = async (row) => {
    state.question = row.question;
    keep("compare", state);
    panes.replaceChildren(
      ...(await Promise.all([pane(row.a, occasions[state.a].label), pane(row.b, occasions[state.b].label)])),
    );
  };
  page.append(
    h(
      "div",
      { class: "bar" },
      labelled("Left", choice(options, state.a, set("a"))),
      labelled("Right", choice(options, state.b, set("b"))),
      labelled("Tint tokens by", choice(TINTS, tint, setTint)),
    ),
    list,
    panes,
  );
  draw();
}

/** Every run's training steps and evaluations: {label, split, run, best: question -> trajectory}. */
function allOccasions() {
  const found = new Map();
  for (let i = 0; i < total; i++) {
    const name = `${columns.run[i]} ${columns.split[i]} ${columns.step[i]}`;
    if (!found.has(name))
      found.set(name, {
        label: `${report.runs.length > 1 ? `${report.runs[columns.run[i]].name}: ` : ""}${occasion(i)}`,
        split: columns.split[i],
        run: columns.run[i],
        attempts: new Map(),
      });
    const { attempts } = found.get(name);
    attempts.set(columns.question[i], [...(attempts.get(columns.question[i]) ?? []), i]);
  }
  const best = (attempts) => new Map([...attempts].map(([name, own]) => [name, cheapest(own) ?? own[0]]));
  return [...found.values()].map(({ attempts, ...what }) => ({ ...what, best: best(attempts) }));
}

function comparison(left, right) {
  const rows = [];
  for (const [name, a] of left.best) {
    const b = right.best.get(name);
    if (b === undefined) continue;
    const saved = columns.calls[a] - columns.calls[b] + (columns.right[b] - columns.right[a]) / 2;
    rows.push({ question: name, a, b, saved });
  }
  return rows;
}

function comparisonTable(rows, left, right, choose) {
  const side = (name) => ({
    number: true,
    value: (row) => columns.calls[row[name]],
    cell: (row) => h("span", {}, outcomeGlyph(row[name]), ` ${plural(columns.calls[row[name]], "call")}`),
  });
  return table(
    rows,
    [
      {
        label: "question",
        value: (row) => report.questions[row.question][2],
        cell: (row) =>
          h("button", { type: "button", class: "link", onclick: () => choose(row) }, report.questions[row.question][2]),
      },
      { label: left.label, ...side("a") },
      { label: right.label, ...side("b") },
      {
        label: "calls saved",
        number: true,
        value: (row) => row.saved,
        text: (row) => String(columns.calls[row.a] - columns.calls[row.b]),
      },
    ],
    { caption: "Questions asked on both; choose one", sort: 3, down: true, page: 6 },
  );
}
