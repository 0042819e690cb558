"use strict";
// A list of any length, of which only what can be seen is on the page.

const ROW = 62; // pixels, as style.css has it
const SPARE = 6; // rows beyond what can be seen

/** row(item) makes a row's children; chosen(item, isClick) is called when one is selected. */
function virtualList(label, row, chosen) {
  const room = h("div", { class: "room" });
  const box = h("div", { class: "list", tabindex: 0, role: "listbox", "aria-label": label }, room);
  const id = newId("row");
  let [items, at] = [[], -1];
  const fill = () => {
    const first = Math.max(0, Math.floor(box.scrollTop / ROW) - SPARE);
    const last = Math.min(items.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + SPARE);
    const rows = [];
    for (let k = first; k < last; k++) rows.push(option(k));
    room.replaceChildren(...rows);
    box.setAttribute("aria-activedescendant", at >= first && at < last ? `${id}-${at}` : "");
  };
  const option = (k) =>
    h(
      "div",
      {
        id: `${id}-${k}`,
        class: "row",
        role: "option",
        "aria-selected": String(k === at),
        "aria-posinset": k + 1,
        "aria-setsize": items.length,
        style: { top: `${k * ROW}px` },
        onclick: () => select(k, true),
      },
      row(items[k]),
    );
  const select = (k, isClick = false) => {
    at = k;
    if (k >= 0) {
      const [top, bottom] = [k * ROW, (k + 1) * ROW];
      if (top < box.scrollTop) box.scrollTop = top;
      else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
      chosen(items[k], isClick);
    }
    fill();
  };
  box.addEventListener("scroll", fill, { passive: true });
  box.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(box.clientHeight / ROW) - 1);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[
      event.key
    ];
    if (!step || !items.length) return;
    event.preventDefault();
    select(Math.min(Math.max(at + step, 0), items.length - 1));
  });
  new ResizeObserver(fill).observe(box);
  const show = (next, selected) => {
    items = next;
    room.style.height = `${items.length * ROW}px`;
    box.scrollTop = 0;
    select(items.indexOf(selected));
  };
  return { element: box, show };
}
