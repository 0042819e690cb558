"use strict";
// Tables that can be sorted.

/**
 * columns: [{label, value(row), text(row) or cell(row), number, title}]; what has a `value` can be sorted by it.
 * options: caption, sort (number of a column), down (largest first), page (rows that are shown at first).
 */
function table(rows, columns, options = {}) {
  const body = h("tbody");
  const head = h("tr");
  const more = h("button", { type: "button", class: "more", onclick: () => ((shown += options.page), fill()) });
  let [sort, down, shown] = [options.sort ?? null, options.down ?? false, options.page ?? Infinity];
  const fill = () => {
    const ordered =
      sort === null ? rows : [...rows].sort((a, b) => compare(columns[sort].value(a), columns[sort].value(b), down));
    body.replaceChildren(
      ...ordered.slice(0, shown).map((row) =>
        h(
          "tr",
          {},
          columns.map((column, k) => cell(row, column, k)),
        ),
      ),
    );
    more.hidden = rows.length <= shown;
    more.textContent = `Show more of ${rows.length.toLocaleString("en")}`;
    columns.forEach((_, k) =>
      head.children[k].setAttribute("aria-sort", k !== sort ? "none" : down ? "descending" : "ascending"),
    );
  };
  columns.forEach((column, k) => {
    const by = () => ([sort, down] = [k, k === sort ? !down : Boolean(column.number)]) && fill();
    const label = column.value ? h("button", { type: "button", onclick: by }, column.label) : column.label;
    head.append(h("th", { scope: "col", class: column.number ? "number" : null, title: column.title }, label));
  });
  fill();
  const caption = options.caption ? h("caption", {}, h("span", {}, options.caption)) : null;
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": options.caption ?? "table" },
    h("table", {}, caption, h("thead", {}, head), body),
    more,
  );
}

function cell(row, column, place) {
  const content = column.cell ? column.cell(row) : column.text(row);
  return h(
    place === 0 ? "th" : "td",
    { class: column.number ? "number" : null, scope: place === 0 ? "row" : null },
    content,
  );
}

/** Nothing comes last, whichever way. */
function compare(a, b, down) {
  const [noA, noB] = [a === null || a === undefined, b === null || b === undefined];
  if (noA || noB) return noA - noB;
  const order = typeof a === "string" ? a.localeCompare(b) : a - b;
  return down ? -order : order;
}
