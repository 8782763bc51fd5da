"use strict";
// Filters the pairs that stand in the page. It hides and orders elements and never makes one from text.
(() => {
  const list = document.getElementById("list");
  if (!list) return;
  const PAGE = 20;
  const cards = Array.from(list.children, (element, place) => ({
    element,
    place,
    round: element.dataset.round,
    set: element.dataset.set,
    margin: Number(element.dataset.margin),
    text: Array.from(element.querySelectorAll(".text, bdi"), (part) => part.textContent).join("\n").toLowerCase(),
  }));
  const field = (id) => document.getElementById(id);
  const orders = {
    round: (a, b) => a.place - b.place,
    high: (a, b) => b.margin - a.margin || a.place - b.place,
    low: (a, b) => a.margin - b.margin || a.place - b.place,
  };
  let shown = PAGE;

  const matches = (card) => {
    const round = field("by-round").value;
    const set = field("by-set")?.value ?? "";
    const from = field("from").valueAsNumber;
    const to = field("to").valueAsNumber;
    const words = field("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    return (
      (round === "" || card.round === round) &&
      (set === "" || card.set === set) &&
      !(card.margin < from) &&
      !(card.margin > to) &&
      words.every((word) => card.text.includes(word))
    );
  };

  const show = () => {
    const found = cards.filter(matches);
    const visible = new Set(found.sort(orders[field("order").value]).slice(0, shown));
    for (const card of cards) card.element.hidden = !visible.has(card);
    list.append(...found.map((card) => card.element));
    field("count").textContent = `${found.length} of these ${cards.length} pairs match; ${visible.size} are shown.`;
    field("more").hidden = visible.size === found.length;
    field("printed").textContent = `${visible.size} of ${cards.length} pairs; open the file for the others.`;
    field("printed").hidden = visible.size === cards.length;
  };

  const restart = () => {
    shown = PAGE;
    show();
  };
  for (const id of ["by-round", "by-set", "from", "to", "search", "order"]) field(id)?.addEventListener("input", restart);
  field("more").addEventListener("click", () => {
    shown += PAGE;
    show();
  });
  field("controls").hidden = false;
  show();
})();
