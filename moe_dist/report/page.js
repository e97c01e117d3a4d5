"use strict";
// All text is made by the page's maker and stands in it. Here rows are only put in another order, hidden and shown.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = document.getElementById("all");
  const body = all.tBodies[0];
  const lines = [...body.rows];
  const make = (name, text, properties = {}) =>
    Object.assign(document.createElement(name), text === undefined ? {} : { textContent: text }, properties);

  function value(key, row) {
    if (key === "number") return row;
    const column = data.values[key];
    return Array.isArray(column) ? column[row] : column.of[column.at[row]];
  }

  const order = [...lines.keys()];  // of rows, as they are sorted
  // Sorting: numbers by size, then texts, then what is null or was not recorded, in either direction.
  const NOTHING = "not recorded";
  const rank = (item) => (item === null || item === NOTHING ? 2 : typeof item === "number" ? 0 : 1);
  function compare(one, other, sign) {
    const ranks = rank(one) - rank(other);
    if (ranks || rank(one) === 2) return ranks;
    if (typeof one === "number") return sign * (one - other);
    return sign * String(one).localeCompare(String(other), "en", { numeric: true });
  }
  const headers = [...all.tHead.rows[0].cells];
  headers.forEach((header, place) => {
    const button = make("button", header.textContent, { type: "button" });
    header.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      headers.forEach((each) => each.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const key = data.columns[place];
      const keys = lines.map((line, row) => value(key, row));
      order.sort((a, b) => compare(keys[a], keys[b], sign) || a - b);
      filter();
      order.forEach((row) => body.append(lines[row]));
    });
  });

  // Filters: any text of the line, and one value of each column that has a few. A browser takes seconds to lay out
  // thousands of lines, so that no more than some are shown before they are asked for.
  let most = 1000;
  const filters = document.getElementById("filters");
  const count = document.getElementById("count");
  const asked = new Map();
  const words = lines.map((line) => line.textContent.toLowerCase());
  const search = make("input", undefined, { type: "search" });
  const more = make("button", "Show the others too", { type: "button" });
  more.addEventListener("click", () => { most = Infinity; filter(); });
  function filter() {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (row) => wanted.every((word) => words[row].includes(word)) &&
      [...asked].every(([key, text]) => text === "" || String(value(key, row)) === text);
    let found = 0;
    for (const row of order) lines[row].hidden = !(fits(row) && ++found <= most);
    const format = (number) => number.toLocaleString("en");
    const all = found === lines.length ? `${format(found)} rows` : `${format(found)} of ${format(lines.length)} rows`;
    count.textContent = found > most ? `${all}, the first ${format(most)} are shown` : all;
    more.hidden = found <= most;
  }
  function labelled(name, control) {
    const label = make("label", name);
    label.append(control);
    filters.append(label);
  }
  labelled("any text", search);
  search.addEventListener("input", filter);
  for (const key of ["file", "model", "world", "placement", "exchange", "backend", "graph", "global_tokens", "skew", "ok", "best_of_placement"]) {
    const place = data.columns.indexOf(key);
    const values = [...new Set(lines.map((line, row) => value(key, row)))].sort((a, b) => compare(a, b, 1));
    if (place < 0 || values.length < 2 || values.length > 100) continue;
    const select = make("select");
    select.append(make("option", "all", { value: "" }));
    for (const item of values) {
      const at = lines.findIndex((line, row) => value(key, row) === item);
      select.append(make("option", lines[at].cells[place].textContent.trim() || "no", { value: String(item) }));
    }
    select.addEventListener("change", () => { asked.set(key, select.value); filter(); });
    labelled(headers[place].textContent, select);
  }
  const reset = make("button", "Show all", { type: "button" });
  reset.addEventListener("click", () => {
    filters.querySelectorAll("select, input").forEach((control) => { control.value = ""; });
    asked.clear();
    filter();
  });
  filters.append(reset);
  count.after(more);
  filter();
  filters.hidden = false;

  // A row's number opens all that is recorded of it.
  const dialog = document.getElementById("row");
  lines.forEach((line, row) => {
    line.cells[0].replaceChildren(make("button", String(row + 1), { type: "button", title: "all keys of this row" }));
  });
  body.addEventListener("click", (event) => {
    if (!(event.target instanceof HTMLButtonElement)) return;
    const row = Number(event.target.textContent) - 1;
    const list = dialog.querySelector("dl");
    list.replaceChildren();
    for (const key of Object.keys(data.values)) {
      const item = value(key, row);
      list.append(make("dt", key), make("dd", typeof item === "string" ? item : JSON.stringify(item)));
    }
    document.getElementById("row-title").textContent = `Row ${row + 1}`;
    dialog.showModal();
  });

  // What a mark says: shown by a pointer or, on a chart that has the focus, by the arrow keys.
  const tip = document.getElementById("tip");
  let on = null;
  function show(mark) {
    on?.classList.remove("on");
    on = mark;
    tip.hidden = !mark;
    if (!mark) return;
    mark.classList.add("on");
    tip.textContent = mark.dataset.tip;
    const place = mark.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(place.left, innerWidth - own.width - 4))}px`;
    tip.style.top = `${place.top > own.height + 8 ? place.top - own.height - 6 : place.bottom + 6}px`;
  }
  for (const chart of document.querySelectorAll("svg")) {
    const marks = [...chart.querySelectorAll(".pt")];
    for (const mark of marks) {  // the browser's own tooltip would come on top
      const title = mark.querySelector("title");
      mark.dataset.tip = title.textContent;
      title.remove();
    }
    chart.addEventListener("pointerover", (event) => show(event.target.closest(".pt")));
    chart.addEventListener("pointerleave", () => show(null));
    chart.addEventListener("blur", () => show(null));
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") show(null);
      if (!step || !marks.length) return;
      event.preventDefault();
      const at = marks.indexOf(on);
      show(marks[at < 0 ? (step > 0 ? 0 : marks.length - 1) : (at + step + marks.length) % marks.length]);
    });
  }
  addEventListener("scroll", () => show(null), { passive: true });

  // On paper everything is open.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((each) => { each.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((each) => { each.open = false; }));
})();
