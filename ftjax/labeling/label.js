"use strict";
// What the server says goes into the page as text, never as markup.
const token = new URLSearchParams(location.search).get("token");
const element = (id) => document.getElementById(id);
const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", t: "tie", s: "skip", u: "undo", "?": "help" };
let labeler = sessionStorage.getItem("labeler");
let pair = null;
let busy = false;

async function ask(action, more = {}) {
  if (busy) return;
  busy = true;
  const lost = action === "judge" || action === "undo" ? "Not saved: " : "";
  try {
    const answer = await fetch(`/${action}`, {
      method: "POST",
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` },
      body: JSON.stringify({ labeler, ...more }),
    });
    const said = await answer.json();
    if (said.error) throw new Error(said.error);
    element("trouble").textContent = said.stale ? "Not saved: that pair was judged in another window. Here is the next one." : "";
    show(said);
  } catch (error) {
    const gone = error instanceof TypeError;
    element("trouble").textContent = gone
      ? `${lost}the server does not answer. Start the command again and open the address that it prints.`
      : lost + error.message;
  } finally {
    busy = false;
  }
}

function show(said) {
  element("start").hidden = true;
  pair = said.pair ?? null;
  element("work").hidden = pair === null;
  element("end").hidden = pair !== null;
  if (said.progress) {
    const { judged, open, per_hour, held } = said.progress;
    element("standing").hidden = false;
    element("bar").max = Math.max(judged + open, 1);
    element("bar").value = judged;
    const speed = per_hour === null ? "" : ` · ${Math.round(per_hour).toLocaleString("en")} an hour`;
    element("progress").textContent = `${judged} of ${judged + open} judged by ${labeler}${speed}`;
    element("more").textContent = held ? `${held} more ${held === 1 ? "is" : "are"} with other labelers.` : "";
    element("go-on").hidden = pair === null;
    for (const button of document.querySelectorAll("[data-act=undo]")) button.disabled = !said.undo;
  } else {
    element("go-on").hidden = false;
  }
  if (pair === null) {
    element("summary").replaceChildren(...said.summary.map((line) => made("li", line)));
    element("end-title").focus();
    return;
  }
  element("prompt").replaceChildren(...pair.prompt.map(turn));
  for (const side of ["left", "right"]) {
    const pieces = pair[side].map(([text, differs]) => (differs ? made("mark", text) : document.createTextNode(text)));
    element(side).replaceChildren(...pieces);
  }
  element("prompt").scrollTop = element("prompt").lastChild.offsetTop - 12; // where the last turn begins
  scrollTo(0, 0);
}

function turn([role, text]) {
  const block = made("div", "");
  block.className = "turn";
  const name = made("p", role);
  name.className = "role";
  const body = made("pre", text);
  body.dir = "auto";
  block.append(name, body);
  return block;
}

function made(tag, text) {
  const one = document.createElement(tag);
  one.textContent = text;
  return one;
}

function act(what) {
  if (what === "help") element("help").showModal();
  else if (what === "undo" || what === "finish") ask(what);
  else if (pair) ask("judge", { pair: pair.id, choice: what });
}

element("start").addEventListener("submit", (event) => {
  event.preventDefault();
  labeler = element("labeler").value;
  sessionStorage.setItem("labeler", labeler);
  ask("next");
});
for (const button of document.querySelectorAll("[data-act]")) button.addEventListener("click", () => act(button.dataset.act));
element("go-on").addEventListener("click", () => ask("next"));
document.addEventListener("keydown", (event) => {
  const what = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  const other = event.ctrlKey || event.altKey || event.metaKey || event.repeat;
  if (!what || other || element("help").open || !element("start").hidden) return; // both have fields to type in
  if (!element("keys").checked && what !== "help") return;
  event.preventDefault();
  act(what);
});
if (labeler !== null) ask("next");
