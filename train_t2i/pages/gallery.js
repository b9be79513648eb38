"use strict";
// Search, order and enlarge what is in the markup already.  Column 0 is the teacher where `taught`.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const main = document.querySelector("main");
  const articles = [...document.querySelectorAll("article")];
  const prompts = articles.map((article) => article.querySelector(".prompt").textContent.toLowerCase());
  const figures = [...document.querySelectorAll("figure[data-column]")];
  const first = data.taught ? 1 : 0; // of the student's columns
  const last = data.columns.length - 1;
  let chosen = null; // the only column shown beside the teacher's; null: all
  let open = { row: 0, column: last };

  function search() {
    const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    articles.forEach((article, row) => {
      article.hidden = !words.every((word) => prompts[row].includes(word));
      found += !article.hidden;
    });
    at("count").textContent = words.length ? `${found} of ${articles.length} prompts` : `${articles.length} prompts`;
    at("none").hidden = found > 0;
  }

  // A row without the score comes last.
  function order() {
    const [name, way, of] = at("order").value.split("|");
    const value = (row) => {
      const scores = data.scores[name][row];
      const found = of === "gain" ? scores[last] - scores[0] : scores[last];
      const whole = scores[last] !== null && (of !== "gain" || scores[0] !== null);
      return whole ? (way === "high" ? -found : found) : Infinity;
    };
    const rows = articles.map((_, row) => row);
    if (name) rows.sort((a, b) => value(a) - value(b) || a - b);
    main.prepend(...rows.map((row) => articles[row]));
  }

  function show(column) {
    chosen = column;
    main.classList.toggle("one", column !== null);
    main.classList.toggle("alone", column !== null && !data.taught);
    for (const figure of figures) {
      const place = Number(figure.dataset.column);
      figure.hidden = column !== null && place !== column && !(data.taught && place === 0);
    }
    at("all").setAttribute("aria-pressed", String(column === null));
    at("chosen").textContent = column === null ? "" : data.columns[column];
  }

  // -- one prompt, large

  function part(row, column) {
    return articles[row].querySelector(`figure[data-column="${column}"]`);
  }

  function fill(place, figure) {
    place.replaceChildren(...(figure ? [...figure.children].map((child) => child.cloneNode(true)) : []));
  }

  function enlarge(row, column) {
    open = { row, column };
    at("large-prompt").textContent = articles[row].querySelector(".prompt").textContent;
    fill(at("large-left"), data.taught ? part(row, 0) : null);
    fill(at("large-right"), part(row, column));
    if (!at("large").open) at("large").showModal();
  }

  function move(by) {
    const shown = [...main.querySelectorAll("article:not([hidden])")].map((article) => Number(article.dataset.row));
    const next = shown[shown.indexOf(open.row) + by];
    if (next !== undefined) enlarge(next, open.column);
  }

  const keys = {
    ArrowLeft: () => enlarge(open.row, Math.max(first, open.column - 1)),
    ArrowRight: () => enlarge(open.row, Math.min(last, open.column + 1)),
    ArrowUp: () => move(-1), ArrowDown: () => move(1),
  };
  at("large").addEventListener("keydown", (event) => {
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  at("large").addEventListener("click", (event) => event.target === at("large") && at("large").close());
  main.addEventListener("click", (event) => {
    if (event.target.tagName !== "IMG") return;
    const column = Number(event.target.closest("figure").dataset.column);
    enlarge(Number(event.target.closest("article").dataset.row), column < first ? (chosen ?? last) : column);
  });

  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || at("large").open || /INPUT|SELECT/.test(event.target.tagName)) return;
    event.preventDefault();
    at("search").focus();
  });
  at("search").addEventListener("input", search);
  if (at("order")) at("order").addEventListener("change", order);
  if (at("step")) {
    at("step").addEventListener("input", () => show(first + Number(at("step").value)));
    at("all").addEventListener("click", () => show(null));
  }
  at("bar").hidden = false;
  at("search").value = "";
  search();
})();
