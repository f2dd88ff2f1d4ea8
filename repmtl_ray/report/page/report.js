"use strict";
// Charts: colours follow the page's colour scheme; a select beside a chart chooses among its figures.
const chartData = JSON.parse(document.getElementById("chart-data").textContent);
const isTouch = matchMedia("(pointer: coarse)").matches;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function themed(layout) {
  const axis = (own) => ({ ...own, gridcolor: colour("--line"), zerolinecolor: colour("--soft"), zerolinewidth: 1.5 });
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
    hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--soft"), font: { color: colour("--ink") } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") },
    dragmode: isTouch ? false : "zoom", // on a phone a drag scrolls the page
    ...(layout.xaxis && { xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis) }),
  };
}

function draw(holder) {
  const select = holder.closest("figure").querySelector("select");
  const figure = chartData[holder.dataset.chart][select ? select.value : 0];
  const buttons = figure.layout.xaxis ? ["toImage", "zoom2d", "pan2d", "resetScale2d"] : ["toImage"];
  const config = { responsive: true, displaylogo: false, displayModeBar: isTouch ? false : "hover", modeBarButtons: [buttons] };
  return Plotly.react(holder, figure.data, themed(figure.layout), config);
}

const holders = [...document.querySelectorAll("[data-chart]")];
const drawn = Promise.all(holders.map(draw));
for (const holder of holders) {
  holder.closest("figure").querySelector("select")?.addEventListener("change", () => draw(holder));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => holders.forEach(draw));

// Tables: a click on a heading sorts; a table that does not fit becomes cards, with a select to sort.
for (const wrapper of document.querySelectorAll(".table")) {
  const table = wrapper.querySelector("table");
  const heads = [...table.tHead.rows[0].cells];
  const sort = (column) => {
    const descending = heads[column].getAttribute("aria-sort") === "ascending";
    for (const head of heads) head.removeAttribute("aria-sort");
    heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const difference = Number(a) - Number(b);
      const order = Number.isNaN(difference) ? a.localeCompare(b) : difference;
      return descending ? -order : order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => compare(value(a), value(b))));
  };
  const select = document.createElement("select");
  select.className = "sort";
  select.add(new Option("sort by ..."));
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sort(column));
    for (const order of ["rising", "falling"]) select.add(new Option(`${head.innerText.trim()}, ${order}`, `${column} ${order}`));
  });
  select.addEventListener("change", () => {
    const [column, order] = select.value.split(" ");
    if (!order) return;
    for (const head of heads) head.removeAttribute("aria-sort");
    if (order === "falling") heads[column].setAttribute("aria-sort", "ascending");
    sort(Number(column));
  });
  wrapper.prepend(select);
  const fit = () => {
    wrapper.classList.remove("cards");
    wrapper.classList.toggle("cards", table.scrollWidth > wrapper.clientWidth);
  };
  fit();
  addEventListener("resize", fit);
}
drawn.then(() => { document.documentElement.dataset.ready = "yes"; });
