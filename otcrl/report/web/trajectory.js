"use strict";
// One trajectory: what was asked, what became of it, and its text, every token of which can be asked about.

const TINTS = [
  ["none", "nothing"],
  ["logprobs", "log-prob: the stronger, the less likely"],
  ["advantages", "advantage: blue up, orange and dotted down"],
  ["ratios", "ratio learner / sampler: blue above 1, orange and dotted below"],
  ["versions", "weights: the stronger, the older"],
];
let tint = "none"; // of all panes

/** The pane of trajectory `i`; `beside` is what it is called when another stands next to it. */
async function pane(i, beside) {
  const t = await detail(i);
  const { text, answers } = question(i);
  const sampled = { next: 0 }; // number of the next sampled token
  const body = h(
    "div",
    { class: "tokens", tabindex: 0, role: "group", "aria-label": "Text. Arrow keys go from token to token." },
    t.segments.map((segment) => segmentBlock(segment, t, sampled)),
  );
  body.addEventListener("keydown", (event) => walk(event, body));
  body.tokens = { t, spread: spread(t) };
  paint(body);
  return h(
    "article",
    { class: "pane", "aria-label": beside ?? "Trajectory" },
    beside ? h("p", { class: "beside" }, beside) : null,
    h("h3", { class: "question" }, text),
    facts(i, t, answers),
    body,
    unseen(t),
  );
}

function facts(i, t, answers) {
  const fact = (label, value) => (value === null ? null : h("div", {}, h("dt", {}, label), h("dd", {}, value)));
  const parts = Object.entries(t.parts).map(([name, value]) => `${name} ${figure(value)}`);
  const tokens =
    t.total === null
      ? null
      : `${columns.sampled[i]} sampled of ${t.total}${t.prompt === null ? "" : `, prompt ${t.prompt}`}`;
  const seconds = Object.entries(t.timings)
    .filter(([, value]) => value)
    .map(([name, value]) => `${name.replace(/_s$/, "")} ${duration(value)}`);
  return h(
    "dl",
    { class: "facts" },
    fact("outcome", outcomeMark(i)),
    fact("answer", t.answer === null ? h("em", {}, "none") : t.answer),
    fact("gold", answers.join(" · ")),
    fact("calls", String(columns.calls[i])),
    fact(
      "reward",
      columns.reward[i] === null ? null : `${figure(columns.reward[i])}${parts.length ? ` (${parts.join(", ")})` : ""}`,
    ),
    fact("tokens", tokens),
    fact("time", seconds.length ? seconds.join(", ") : null),
    fact("from", `${report.runs.length > 1 ? `${report.runs[columns.run[i]].name}, ` : ""}${occasion(i)}`),
    fact("ended", columns.stop[i].replace("_", " ")),
    fact("violations", t.violations.length ? t.violations.join("; ") : null),
  );
}

function outcomeMark(i) {
  const [glyph, word] = isVoid(i) ? ["∅", "void"] : columns.right[i] ? ["✓", "right"] : ["✗", "wrong"];
  return h("span", { class: `mark ${word}` }, h("span", { "aria-hidden": "true" }, glyph), ` ${word}`);
}

function segmentBlock([kind, calls, pieces], t, sampled) {
  const name = report.kinds[kind];
  const text = h("div", { class: "text", dir: "auto" });
  for (const piece of pieces) {
    const place = name === "observation" ? "" : sampled.next++;
    text.append(h("span", { class: "t", "data-k": place }, piece));
  }
  return h(
    "section",
    { class: `segment ${name}`, "aria-label": name },
    h("h4", {}, segmentTitle(name, calls, t)),
    text,
  );
}

function segmentTitle(name, calls, t) {
  const numbers =
    calls.length > 1 ? `s ${calls[0] + 1} to ${calls.at(-1) + 1}` : calls.length ? ` ${calls[0] + 1}` : "";
  if (name !== "call") return name + (name === "observation" ? numbers : "");
  const became = calls.map((k) => {
    const [tool, outcome, seconds, cached, price] = t.calls[k];
    const words = [tool || "malformed", outcome.replace("_", " "), cached ? "cached" : duration(seconds)];
    return [...words, ...(price ? [`price ${figure(price)}`] : [])].join(" · ");
  });
  return [`call${numbers}`, became.join(" + ")].join(" · ");
}

/** What calls came to whose result the policy was never shown. */
function unseen(t) {
  const lost = t.calls.map((call, k) => [call, k]).filter(([call]) => call[5]);
  return lost.length
    ? h(
        "div",
        {},
        lost.map(([call, k]) =>
          h("p", { class: "note" }, `call ${k + 1}, ${call[0]}, ${call[1].replace("_", " ")}: ${call[5]}`),
        ),
      )
    : null;
}

// -- tokens --------------------------------------------------------------------------------------------------

/** Of sampled token `k`; null where it is not known. A number holds for all of them. */
const ofToken = (values, k) =>
  values === undefined || values === null ? null : typeof values === "number" ? values : (values[k] ?? null);

/** The largest advantage either way and the newest version: what the tints are scaled by. */
function spread(t) {
  const all = (values) => (Array.isArray(values) ? values : [values ?? 0]).map((value) => value ?? 0);
  const most = (values) => values.reduce((a, b) => Math.max(a, b), 0);
  return { advantages: most(all(t.advantages).map(Math.abs)), versions: most(all(t.versions)) };
}

/** Strength from 0 to 4 and side, + or -, of a token's tint. */
function strength(t, k, limit) {
  const value = ofToken(t[tint], k);
  if (value === null) return [0, "+"];
  if (tint === "logprobs") return [Math.min(4, Math.round(-value)), "-"];
  if (tint === "advantages")
    return [limit.advantages ? Math.ceil((4 * Math.abs(value)) / limit.advantages) : 0, value < 0 ? "-" : "+"];
  if (tint === "ratios") return [Math.min(4, Math.round(Math.abs(Math.log(value)) / 0.1)), value < 1 ? "-" : "+"];
  return [Math.min(4, limit.versions - value), "-"];
}

function paint(body) {
  const { t, spread: limit } = body.tokens;
  for (const token of body.querySelectorAll(".t")) {
    const [level, side] = tint === "none" || token.dataset.k === "" ? [0, "+"] : strength(t, +token.dataset.k, limit);
    token.dataset.heat = level ? `${side}${level}` : "";
  }
}

function setTint(value) {
  tint = value;
  document.querySelectorAll(".tokens").forEach(paint);
}

/** A token's text with what cannot be seen in it written out. */
const visible = (text) =>
  text === ""
    ? "(part of a character)"
    : JSON.stringify(text).replace(
        /[\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
        (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
      );

/** [label, value] of what is known of a token. */
function tokenFacts(token) {
  const { t } = token.closest(".tokens").tokens;
  if (token.dataset.k === "")
    return [
      ["token", visible(token.textContent)],
      ["mask", "0, injected"],
    ];
  const [logprob, advantage, ratio, version] = ["logprobs", "advantages", "ratios", "versions"].map((name) =>
    ofToken(t[name], +token.dataset.k),
  );
  if (t.logprobs === undefined) return [["text", "its tokens were not recorded"]];
  return [
    ["token", visible(token.textContent)],
    ["mask", "1, sampled"],
    ["log-prob", logprob === null ? NOTHING : `${logprob.toFixed(4)} (p ${Math.exp(logprob).toPrecision(3)})`],
    ["advantage", advantage === null ? "not learned from" : advantage.toFixed(4)],
    ["ratio", ratio === null ? NOTHING : ratio.toFixed(4)],
    ["weights", version === null ? NOTHING : `version ${version}`],
  ];
}

function showTip(token) {
  const tip = byId("tip");
  const known = tokenFacts(token);
  tip.replaceChildren(
    h(
      "dl",
      {},
      known.map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", {}, value))),
    ),
  );
  tip.hidden = false;
  document.querySelector(".t.current")?.classList.remove("current");
  token.classList.add("current");
  placeTip(token);
  return known;
}

function placeTip(token) {
  const tip = byId("tip");
  const box = token.getBoundingClientRect();
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - tip.offsetHeight - 6)}px`;
}

function hideTip() {
  byId("tip").hidden = true;
  document.querySelector(".t.current")?.classList.remove("current");
}

function walk(event, body) {
  const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
  if (event.key === "Escape") hideTip();
  if (!step) return;
  event.preventDefault();
  const tokens = [...body.querySelectorAll(".t")];
  const at = tokens.findIndex((token) => token.classList.contains("current"));
  const next = tokens[Math.min(Math.max(at + step, 0), tokens.length - 1)];
  next.scrollIntoView({ block: "nearest" });
  say(
    showTip(next)
      .map((fact) => fact.join(" "))
      .join(", "),
  );
}

function watchTokens() {
  const token = (event) => event.target.closest?.(".t");
  document.addEventListener("mouseover", (event) => (token(event) ? showTip(token(event)) : hideTip()));
  document.addEventListener("click", (event) => token(event) && showTip(token(event)));
  document.addEventListener("focusout", hideTip);
  const follow = () => document.querySelector(".t.current") && placeTip(document.querySelector(".t.current"));
  document.addEventListener("scroll", follow, { capture: true, passive: true });
}
