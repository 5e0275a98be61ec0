"use strict";
// What the server says goes into the page as text, never as markup.
const SVG = "http://www.w3.org/2000/svg";
const OPEN = ["validating_files", "queued", "running"]; // statuses that change without anyone asking
const ALLOWED = { pause: OPEN, resume: ["paused"], cancel: [...OPEN, "paused"] };
const SECONDS = 2; // between two looks at what is open
const PAGES = 20; // of 100 events, that are read at first
const CHARTS = [
  ["Loss", { train_loss: "training", full_valid_loss: "validation" }],
  ["Mean reward", { train_mean_reward: "training", full_valid_mean_reward: "validation" }],
  ["Token accuracy", { train_mean_token_accuracy: "training", full_valid_mean_token_accuracy: "validation" }],
  ["Preference accuracy", { train_accuracy: "training", full_valid_accuracy: "validation" }],
];
const element = (id) => document.getElementById(id);
let key = sessionStorage.getItem("key");
let jobs = [];
let more = false; // whether there are older jobs
let jobsShown = ""; // what the list was made of
let shown = null; // the job whose page is open: {job, events, checkpoints, older}
let timer = 0;
let wasOpen = false;
let lost = false; // whether the last look failed
let turn = 0; // of looks and views; what was asked for an earlier one is dropped

// The server.

async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = { Authorization: `Bearer ${key}` };
  const form = body instanceof FormData;
  if (body !== undefined && !form) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: body === undefined || form ? body : JSON.stringify(body) });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer; try again once it is there.");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  if (answer.status === 401) leave();
  throw new Error(said.error?.message ?? `The server answered with status ${answer.status}.`);
}

const json = async (...asked) => (await ask(...asked)).json();

// Runs what a person asked for; what goes wrong is said.
async function run(work) {
  element("trouble").textContent = "";
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") element("trouble").textContent = error.message;
  }
}

function say(text) {
  element("said").textContent = text;
}

// Elements.

function made(tag, text = "", classes = "", more = {}) {
  const one = document.createElement(tag);
  one.textContent = text;
  if (classes) one.className = classes;
  for (const [name, value] of Object.entries(more)) one.setAttribute(name, value);
  return one;
}

function holding(tag, classes, ...inside) {
  const one = made(tag, "", classes);
  one.append(...inside.filter(Boolean));
  return one;
}

function button(text, about, work, classes = "") {
  const one = made("button", text, classes, { type: "button", "aria-label": about ? `${text} ${about}` : text });
  one.addEventListener("click", async () => {
    one.disabled = true;
    await run(work);
    one.disabled = false;
  });
  return one;
}

function link(text, about, href) {
  return made("a", text, "", { href, "aria-label": `${text} ${about}` });
}

// Replaces what a list holds; what has the focus keeps it.
function fill(list, items) {
  const called = (one) => one.getAttribute("aria-label") ?? one.textContent;
  const focused = list.contains(document.activeElement) ? called(document.activeElement) : null;
  list.replaceChildren(...items);
  if (focused !== null) [...list.querySelectorAll("a, button")].find((one) => called(one) === focused)?.focus();
}

const time = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
const size = (bytes) => (bytes < 1e4 ? `${bytes} bytes` : bytes < 1e7 ? `${(bytes / 1e3).toFixed(0)} kB` : `${(bytes / 1e6).toFixed(0)} MB`);
const figure = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4))));

// "ft:BASE:KEY:SUFFIX:ID:ckpt-step-4" as "SUFFIX ID, step 4".
function short(name) {
  const [kind, base, , suffix, id, step] = name.split(":");
  if (kind !== "ft" || id === undefined) return `${name} (base)`;
  return `${suffix || base} ${id}${step ? `, step ${step.replace("ckpt-step-", "")}` : ""}`;
}

// Whether a person says yes, in a dialog.
function sure(title, yes, text) {
  const dialog = element("confirm");
  element("confirm-title").textContent = title;
  element("yes").textContent = yes;
  element("confirm-text").textContent = text;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => done(dialog.returnValue === "yes"), { once: true }));
}

async function save(from, name) {
  const answer = await ask(from);
  const place = URL.createObjectURL(await answer.blob());
  const given = answer.headers.get("Content-Disposition")?.match(/filename="([^"]+)"/)?.[1];
  const anchor = made("a", "", "", { href: place, download: given ?? name });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(place), 60000);
  say(`${given ?? name} is downloaded.`);
}
