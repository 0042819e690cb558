"use strict";
// Pages and the address: #page?filter=value. A page is made when it is first shown.

const PAGES = [
  ["summary", "Summary", summaryPage],
  ["training", "Training", trainingPage],
  ["calls", "Calls", callsPage],
  ["tools", "Tools", toolsPage],
  ["trajectories", "Trajectories", viewerPage],
  ["compare", "Compare", comparePage],
];
const made = new Map(); // name of a page -> its section

/** Another page, or the same with other filters. */
function go(name, state) {
  const kept = Object.entries(state).filter(([, value]) => value !== null && value !== undefined);
  location.hash = `${name}?${new URLSearchParams(kept)}`;
}

/** What the page shows, in the address, without a page of history for each. */
function keep(name, state) {
  const kept = Object.entries(state).filter(([, value]) => value !== null && value !== undefined);
  history.replaceState(null, "", `#${name}${kept.length ? `?${new URLSearchParams(kept)}` : ""}`);
}

function route() {
  const [wanted, filters] = location.hash.slice(1).split("?");
  if (wanted === "main" && made.size) return byId("main").focus();
  const [name, , make] = PAGES.find(([each]) => each === wanted) ?? PAGES[0];
  for (const [each, section] of made) section.hidden = each !== name;
  if (!made.has(name) || filters !== undefined) {
    made.get(name)?.remove();
    const section = h("section", { class: `page ${name}` });
    byId("main").append(section);
    made.set(name, section);
    make(section, Object.fromEntries(new URLSearchParams(filters ?? "")));
  }
  for (const link of byId("nav").children) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${PAGES.find(([each]) => each === name)[1]} · ${report.title}`;
}

byId("title").textContent = report.title;
byId("foot").textContent = report.made;
byId("nav").append(...PAGES.map(([name, label]) => h("a", { href: `#${name}` }, label)));
addEventListener("hashchange", route);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
watchTokens();
route();
