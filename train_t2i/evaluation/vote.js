"use strict";
// Blind votes between two models, a row at a time.  A vote is kept as the models' names, never as a side alone.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const KEY = "train_t2i votes " + data.sheet;
  // seen: names were on the screen, so that later votes are not blind; votes: "i-j" -> row -> vote
  let state = { seen: false, votes: {} };
  let pair = [0, 1];
  let place = 0;

  function restore() {
    try {
      state = JSON.parse(localStorage.getItem(KEY)) || state;
    } catch {
      // a browser that keeps nothing: votes last as long as the page
    }
  }

  function remember() {
    try {
      localStorage.setItem(KEY, JSON.stringify(state));
    } catch {
      // likewise
    }
  }

  const pairKey = () => pair.join("-");
  const votes = () => (state.votes[pairKey()] ??= {});
  const sides = (row) => (row.flipped[pairKey()] ? [pair[1], pair[0]] : pair);

  function firstOpen() {
    const open = data.rows.findIndex((row) => !(row.number in votes()));
    return open < 0 ? data.rows.length : open;
  }

  function show() {
    const done = place >= data.rows.length;
    const cast = Object.keys(votes()).length;
    at("progress").textContent = `${cast} of ${data.rows.length} votes`;
    at("bar").value = cast;
    at("ballot").hidden = done;
    at("done").hidden = !done;
    at("undo").disabled = place === 0;
    if (done) {
      const open = data.rows.length - cast;
      at("finished").hidden = open > 0;
      at("skipped").hidden = open === 0;
      at("skipped").textContent = `Go through the ${open} that were skipped`;
      return;
    }
    const row = data.rows[place];
    for (const [choice, id] of [["left", "choose-left"], ["right", "choose-right"], ["tie", "tie"]])
      at(id).setAttribute("aria-pressed", String(votes()[row.number]?.choice === choice));
    at("prompt").textContent = row.prompt;
    sides(row).forEach((model, side) => {
      at(side ? "right" : "left").src = row.images[model];
    });
    at("edited").hidden = row.sources.length === 0;
    at("sources").replaceChildren(...row.sources.map(shownSource));
    const next = data.rows[place + 1];
    if (next) [...next.sources, ...next.images].forEach((source) => (new Image().src = source));
  }

  function shownSource(source) {
    const image = new Image();
    image.src = source;
    image.alt = "source";
    image.className = at("sources").className;
    return image;
  }

  function vote(choice) {
    if (at("vote").hidden || place >= data.rows.length) return;
    const row = data.rows[place];
    const [left, right] = sides(row).map((model) => data.models[model]);
    votes()[row.number] = { row: row.number, prompt: row.prompt, left, right, choice, blind: !state.seen };
    remember();
    place += 1;
    show();
  }

  function go(by) {
    place = Math.min(Math.max(place + by, 0), data.rows.length);
    show();
  }

  function showNames() {
    const open = !state.seen && firstOpen() < data.rows.length;
    if (!open || confirm("Votes after the names have been shown are not counted. Show the names?")) tab("names");
  }

  function tab(name) {
    for (const each of ["vote", "names"]) {
      at(each).hidden = each !== name;
      at("tab-" + each).setAttribute("aria-selected", String(each === name));
    }
    if (name === "names") {
      state.seen = true;
      remember();
    }
    at("not-blind").hidden = !state.seen;
  }

  function download() {
    const cast = Object.values(state.votes).flatMap((rows) => Object.values(rows));
    const text = JSON.stringify({ format: "train_t2i votes", sheet: data.sheet, models: data.models, votes: cast }, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text + "\n"], { type: "application/json" }));
    link.download = "votes.json";
    link.click();
    URL.revokeObjectURL(link.href);
  }

  function clear() {
    if (!confirm("Forget all votes of this sheet?")) return;
    state = { seen: state.seen, votes: {} };
    remember();
    place = 0;
    show();
  }

  const keys = {
    a: () => vote("left"), ArrowLeft: () => vote("left"), b: () => vote("right"), ArrowRight: () => vote("right"),
    t: () => vote("tie"), ArrowDown: () => vote("tie"), u: () => go(-1), s: () => go(1),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.tagName === "SELECT") return;
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act && !at("vote").hidden) {
      event.preventDefault();
      act();
    }
  });
  const buttons = {
    "choose-left": () => vote("left"), "choose-right": () => vote("right"), tie: () => vote("tie"),
    undo: () => go(-1), back: () => go(-1), skip: () => go(1), skipped: () => go(firstOpen() - place),
    download, clear, "tab-vote": () => tab("vote"), "tab-names": showNames,
  };
  for (const [id, act] of Object.entries(buttons)) at(id).addEventListener("click", act);
  at("left").addEventListener("click", () => vote("left"));
  at("right").addEventListener("click", () => vote("right"));
  at("pair").addEventListener("change", (event) => {
    pair = event.target.value.split("-").map(Number);
    place = firstOpen();
    show();
  });

  restore();
  place = firstOpen();
  tab("vote");
  show();
})();
