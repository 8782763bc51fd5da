"use strict";
// Follows the run: puts sections that changed in place of the old ones, and reads pairs page by page. What it puts into
// the page is HTML that the server made, in which model text is escaped; the page's policy lets no other script run.
(() => {
  const EVERY = 2000;
  const $ = (id) => document.getElementById(id);
  const form = $("controls");
  let tag = "";
  let served = new Map(Array.from(parts(document), (part) => [part.id, part.outerHTML]));
  let page = 0;
  let total = null;
  let asking = new AbortController();

  function parts(of) {
    return Array.from(of.querySelectorAll("#head, main > section")).filter((part) => part.id !== "pairs");
  }

  async function ask(address, signal) {
    const answer = await fetch(address, { signal, cache: "no-store" });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  }

  const say = (id, text) => {
    if ($(id).textContent !== text) $(id).textContent = text;
  };

  // --- the run ---

  // The part of the page that is being read stays where it is, whatever changes above it.
  function keepingPlace(change) {
    const seen = [...parts(document), $("pairs")].find((part) => part.getBoundingClientRect().bottom > 0);
    const before = seen?.getBoundingClientRect().top;
    change();
    const now = seen && $(seen.id);
    if (now && window.scrollY > 0) window.scrollBy({ top: now.getBoundingClientRect().top - before, behavior: "instant" });
  }

  const named = (of) => new Map(Array.from(of.querySelectorAll("[aria-label], summary, a"), (it) => [key(it), it]));
  const key = (it) => it.tagName + (it.getAttribute("aria-label") ?? it.textContent);

  function replace(old, part) {
    const news = named(part);
    for (const [name, it] of named(old)) {
      const other = news.get(name);
      if (other && it.tagName === "SUMMARY") other.parentElement.open = it.parentElement.open;
    }
    const scrolled = Array.from(named(old)).filter(([, it]) => it.scrollLeft > 0).map(([name, it]) => [name, it.scrollLeft]);
    const focused = old.contains(document.activeElement) ? key(document.activeElement) : null;
    old.replaceWith(part);
    for (const [name, left] of scrolled) if (news.has(name)) news.get(name).scrollLeft = left;
    if (focused) news.get(focused)?.focus({ preventScroll: true });
  }

  const selected = (part) => !getSelection().isCollapsed && part.contains(getSelection().anchorNode);

  function renew(html) {
    const fresh = new DOMParser().parseFromString(html, "text/html");
    let waits = false;
    keepingPlace(() => {
      let before = null;
      const found = parts(fresh);
      for (const part of found) {
        const old = $(part.id);
        const text = part.outerHTML;
        if (!old) {
          if (before && before.id !== "head") before.after(part);
          else document.querySelector("main").prepend(part);
        } else if (served.get(part.id) !== text) {
          if (selected(old)) {
            waits = true;
            before = old;
            continue;
          }
          replace(old, part);
        }
        served.set(part.id, text);
        before = $(part.id);
      }
      for (const old of parts(document)) {
        if (!found.some((part) => part.id === old.id)) {
          served.delete(old.id);
          old.remove();
        }
      }
      const rounds = fresh.querySelector("[name=round]");
      if (rounds.childElementCount !== form.elements.round.childElementCount) {
        const chosen = form.elements.round.value;
        form.elements.round.innerHTML = rounds.innerHTML;
        form.elements.round.value = chosen;
      }
    });
    return !waits;
  }

  async function look() {
    try {
      const state = await ask("state");
      if (state.tag !== tag) {
        const html = await (await fetch("./", { cache: "no-store" })).text();
        const first = tag === "";
        if (renew(html)) tag = state.tag;
        if (!first) recount();
      }
      say("live", state.fault ? `The files cannot be read now, so this is how they were: ${state.fault}` : "Follows the run.");
    } catch {
      say("live", "The server has ended: this is how the run was. Start ple report --watch again and take its new address.");
    }
    setTimeout(look, EVERY);
  }

  // --- the pairs ---

  function wanted() {
    const query = new URLSearchParams();
    for (const [name, value] of new FormData(form)) if (value.trim() !== "") query.set(name, value.trim());
    return query;
  }

  async function recount() {
    const query = wanted();
    try {
      const { count } = await ask(`count?${query}`);
      if (`${query}` !== `${wanted()}` || count === total) return;
      if (total === null) told(count);
      else if (total === 0) show(0);
      else $("fresh").hidden = false;
    } catch {
      // `look` says it
    }
  }

  function told(count) {
    total = count;
    const shown = $("list").childElementCount;
    const from = page * Number(document.body.dataset.page);
    const place = shown ? `; these are ${from + 1} to ${from + shown}` : "";
    say("count", `${count.toLocaleString("en")} ${count === 1 ? "pair matches" : "pairs match"}${place}.`);
  }

  async function show(at, focus = false) {
    asking.abort();
    asking = new AbortController();
    const { signal } = asking;
    const query = wanted();
    page = at;
    total = null;
    $("fresh").hidden = true;
    say("count", "Reading …");
    try {
      const found = await ask(`pairs?${query}&page=${at}`, signal);
      $("list").innerHTML = found.html;
      $("previous").hidden = at === 0;
      $("next").hidden = !found.more;
      if (focus) {
        $("count").tabIndex = -1;
        $("count").focus();
      }
      const here = at * Number(document.body.dataset.page) + $("list").childElementCount;
      told(found.more ? (await ask(`count?${query}`, signal)).count : here);
    } catch (error) {
      if (error.name !== "AbortError") say("count", error.message);
    }
  }

  async function opened(details) {
    const { round, unit, row } = details.dataset;
    if (details.dataset.read) return;
    details.dataset.read = "yes";
    const place = document.createElement("div");
    place.setAttribute("role", "status");
    place.textContent = "Reading …";
    details.append(place);
    try {
      place.innerHTML = (await ask(`prompts?${new URLSearchParams({ round, unit, row })}`)).html;
    } catch (error) {
      place.textContent = error.message;
      delete details.dataset.read;
    }
  }

  form.addEventListener("change", () => show(0));
  form.addEventListener("submit", (event) => event.preventDefault()); // Enter in a field is a change too
  $("fresh").addEventListener("click", () => show(page));
  $("previous").addEventListener("click", () => show(page - 1, true));
  $("next").addEventListener("click", () => show(page + 1, true));
  $("list").addEventListener("toggle", (event) => event.target.open && opened(event.target), true);
  show(0);
  look();
})();
