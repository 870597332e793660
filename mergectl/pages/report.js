"use strict";
// Sorting: the buttons in a table's head; base and experts stay above. A second press turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    head.querySelector("button").addEventListener("click", () => {
      const numeric = head.classList.contains("num");
      const before = head.getAttribute("aria-sort");
      const order = before ? (before === "ascending" ? "descending" : "ascending") : numeric ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      for (const body of table.querySelectorAll("tbody.ranked")) {
        const key = (row) => {
          const cell = row.cells[place];
          const text = cell.dataset.sort ?? cell.textContent.trim();
          return numeric ? (text === "" ? null : Number(text)) : text;
        };
        const rows = [...body.rows].sort((one, two) => {
          const [a, b] = [key(one), key(two)];
          if (a === null || b === null) return (a === null) - (b === null);
          return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
        });
        body.append(...rows);
      }
    });
  });
}

// Filtering: rows whose text holds every word.
for (const field of document.querySelectorAll("input[data-filter]")) {
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of document.querySelectorAll(`#${CSS.escape(field.dataset.filter)} tbody.ranked tr`)) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}

// What a mark stands for, beside the pointer; the same stands in the table under the picture.
const tip = document.getElementById("tip");
document.addEventListener("pointerover", (event) => {
  const mark = event.target.closest?.("[data-tip]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const place = mark.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(place.left + 12, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${place.top > tip.offsetHeight + 16 ? place.top - tip.offsetHeight - 8 : place.bottom + 8}px`;
});

// A link to a run opens it.
const open = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", open);
open();
