
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const CHOICES = ["first", "second", "tie"];
  const KEYS = { "1": "first", ArrowLeft: "first", "2": "second", ArrowRight: "second", "3": "tie", t: "tie", T: "tie" };
  const STORAGE = "ple-judge:" + data.page;

  // progress: the choices of each annotator by name, one an item, in the items' order and on the items' own sides
  let progress = new Map();
  let annotator = null;

  function load() {
    progress = new Map();
    annotator = null;
    let text;
    try {
      text = localStorage.getItem(STORAGE);
    } catch {
      $("warning").hidden = false;
    }
    try {
      const kept = JSON.parse(text ?? "null") ?? { people: [] };
      for (const [name, choices] of kept.people) {
        if (choices.every((choice) => CHOICES.includes(choice))) progress.set(name, choices.slice(0, data.items.length));
      }
      if (progress.has(kept.annotator)) annotator = kept.annotator;
    } catch {
      // not what this page keeps: begin anew
    }
  }

  function keep() {
    try {
      localStorage.setItem(STORAGE, JSON.stringify({ people: [...progress], annotator }));
    } catch {
      $("warning").hidden = false;
    }
  }

  const chosen = () => progress.get(annotator);

  // whether this annotator sees the responses of a query the other way round: FNV-1a, mixed as in MurmurHash3
  function swapped(item) {
    let hash = 0x811c9dc5;
    for (const byte of new TextEncoder().encode(JSON.stringify([data.page, annotator, item.id]))) {
      hash = Math.imul(hash ^ byte, 0x01000193);
    }
    hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
    hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
    return ((hash ^ (hash >>> 16)) & 1) === 1;
  }

  const OTHER = { first: "second", second: "first", tie: "tie" };
  const onItsSide = (item, choice) => (swapped(item) ? OTHER[choice] : choice);

  function put(id, text) {
    const empty = text.trim() === "";
    $(id).textContent = empty ? "(empty)" : text.trim();
    $(id).classList.toggle("empty", empty);
  }

  function render() {
    const total = data.items.length;
    const at = annotator === null ? 0 : chosen().length;
    const step = annotator === null ? "start" : at < total ? "task" : "done";
    for (const id of ["start", "task", "done"]) $(id).hidden = id !== step;
    $("bar").hidden = step === "start";
    $("choices").hidden = step === "start";
    $("total").textContent = total === 1 ? "1 query" : total + " queries";
    if (step === "start") return;
    $("progress").max = total;
    $("progress").value = at;
    $("count").textContent = step === "task" ? `Query ${at + 1} of ${total}` : `${total} of ${total} judged`;
    $("person").textContent = "Annotator: " + annotator;
    $("undo").disabled = at === 0;
    for (const button of document.querySelectorAll("[data-choice]")) button.disabled = step === "done";
    if (step === "task") {
      const item = data.items[at];
      put("query", item.x);
      put("first", item[onItsSide(item, "first")]);
      put("second", item[onItsSide(item, "second")]);
    }
    window.scrollTo(0, 0);
  }

  function show() {
    render();
    const target = annotator === null ? "name" : chosen().length < data.items.length ? "query-title" : "done-title";
    $(target).focus({ preventScroll: true });
  }

  function choose(choice) {
    if (annotator === null || chosen().length >= data.items.length) return;
    chosen().push(onItsSide(data.items[chosen().length], choice));
    keep();
    show();
  }

  function undo() {
    if (annotator === null || chosen().length === 0) return;
    chosen().pop();
    keep();
    show();
  }

  function begin(event) {
    event.preventDefault();
    const name = $("name").value.trim();
    if (name === "") {
      $("name").focus();
      return;
    }
    annotator = name;
    if (!progress.has(name)) progress.set(name, []);
    keep();
    show();
  }

  function change() {
    annotator = null;
    $("name").value = "";
    keep();
    show();
  }

  function save() {
    const verdicts = chosen().map((choice, at) => ({
      query_id: data.items[at].id, choice, swapped: swapped(data.items[at]),
    }));
    const record = { version: 2, kind: "annotations", page: data.page, annotator, verdicts };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(record, null, 1) + "\n"], { type: "application/json" }));
    link.download = `annotations-${data.page}-${annotator.replace(/[^\p{L}\p{N}]+/gu, "_")}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.tagName === "INPUT") return;
    if (event.key in KEYS) choose(KEYS[event.key]);
    else if (["u", "U", "Backspace"].includes(event.key)) undo();
    else return;
    event.preventDefault();
  }

  document.addEventListener("keydown", press);
  for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => choose(button.dataset.choice));
  $("undo").addEventListener("click", undo);
  $("form").addEventListener("submit", begin);
  $("change").addEventListener("click", change);
  $("export").addEventListener("click", save);
  $("export-done").addEventListener("click", save);
  window.addEventListener("storage", (event) => {
    if (event.key === STORAGE) {
      load();
      render();
    }
  });
  load();
  show();
})();
