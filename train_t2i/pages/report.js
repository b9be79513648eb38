"use strict";
// Sample sheets one at a time: a slider a run.  Without this script all of them stand below each other.
for (const timeline of document.querySelectorAll(".timeline")) {
  const control = timeline.querySelector(".slider");
  if (!control) continue;
  const sheets = timeline.querySelector(".sheets");
  const figures = [...sheets.children];
  const [slider, told, all] = control.children;

  const show = (every) => {
    const place = Number(slider.value);
    figures.forEach((figure, i) => (figure.hidden = !every && i !== place));
    sheets.classList.toggle("one", !every);
    all.setAttribute("aria-pressed", String(every));
    told.textContent = every ? "" : figures[place].querySelector("b").textContent;
  };
  slider.addEventListener("input", () => show(false));
  all.addEventListener("click", () => show(all.getAttribute("aria-pressed") !== "true"));
  control.hidden = false;
  show(false);
}
