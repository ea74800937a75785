// Values under the pointer, and tables sorted by a click; the page is whole without it.
"use strict";
const marks = JSON.parse(document.getElementById("marks").textContent);
const hover = document.getElementById("hover");

function say(text, event) {
  hover.hidden = !text;
  if (!text) return;
  hover.textContent = text;
  const box = hover.getBoundingClientRect();
  const right = Math.min(event.clientX + 14, innerWidth - box.width - 6);
  const above = event.clientY - box.height - 12;
  hover.style.left = `${Math.max(6, right)}px`;
  hover.style.top = `${above > 4 ? above : event.clientY + 18}px`;
}

function inCells(of, x, y) {
  if (!of.grid) return null;
  const [left, bottom, width, height] = of.grid;
  const start = Math.floor((x - left) / width), row = Math.floor((bottom - y) / height);
  const value = (of.rows[row] || [])[start];
  if (value === undefined) return null;
  const middle = [left + (start + 0.5) * width, bottom - (row + 0.5) * height];
  return [...middle, `n = ${row + 1}, layers [${start}, ${start + row + 1}): ${value.toFixed(4)}`];
}

function nearest(of, x, y) {
  let best = null, least = 18 * 18;
  for (const mark of of.marks) {
    const far = (mark[0] - x) ** 2 + (mark[1] - y) ** 2;
    if (far < least) [best, least] = [mark, far];
  }
  return best;
}

for (const figure of document.querySelectorAll(".drawing")) {
  const svg = figure.querySelector("svg"), of = marks[figure.dataset.name];
  const spot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  spot.setAttribute("class", "spot");
  spot.setAttribute("r", "5");
  const leave = () => { spot.remove(); say("", null); };
  const move = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const found = inCells(of, at.x, at.y) || nearest(of, at.x, at.y);
    if (!found) return leave();
    spot.setAttribute("cx", found[0]);
    spot.setAttribute("cy", found[1]);
    svg.append(spot);
    say(found[2], event);
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", leave);
}

for (const cell of document.querySelectorAll("[data-says]")) {
  cell.addEventListener("pointermove", (event) => say(cell.dataset.says, event));
  cell.addEventListener("pointerleave", () => say("", null));
}

const scrolled = [...document.querySelectorAll(".scroll")];
const watch = new ResizeObserver(() => {
  for (const one of scrolled) one.classList.toggle("wider", one.scrollWidth > one.clientWidth);
});
for (const one of scrolled) watch.observe(one);

function keyOf(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  if (cell.textContent === "–") return Infinity;
  const number = parseFloat(cell.textContent.replace("−", "-"));
  return /^[−+-]?\d/.test(cell.textContent) && !Number.isNaN(number) ? number : cell.textContent;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (!head.textContent) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map((row) => [keyOf(row, column), row]);
      rows.sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}
