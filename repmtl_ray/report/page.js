"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const number = Number(a) - Number(b);
      const order = Number.isNaN(number) ? a.localeCompare(b) : number;
      return down ? -order : order;
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => compare(value(a), value(b)));
    table.tBodies[0].append(...rows);
  }));
}
for (const select of document.querySelectorAll("select[data-shows]")) {
  const charts = [...select.parentElement.querySelectorAll("[data-choice]")];
  const show = () => charts.forEach((chart) => { chart.hidden = chart.dataset.choice !== select.value; });
  select.addEventListener("change", show);
  show();
}
document.documentElement.dataset.ready = "yes";
