// Views: #jobs, #job=ID, #new, #chat, #chat=MODEL, #stored.

const wanted = () => (location.hash.startsWith("#job=") ? location.hash.slice(5) : null);

async function show() {
  turn += 1;
  clearTimeout(timer);
  element("enter").hidden = key !== null;
  element("views").hidden = key === null;
  const [name, value] = location.hash.slice(1).split("=");
  const view = ["jobs", "job", "new", "chat", "stored"].includes(name) ? name : "jobs";
  for (const one of document.querySelectorAll("main > section")) one.hidden = key === null || one.id !== view;
  for (const one of document.querySelectorAll("#views a")) {
    if (one.hash === `#${view}` || (view === "job" && one.hash === "#jobs")) one.setAttribute("aria-current", "page");
    else one.removeAttribute("aria-current");
  }
  if (key === null) {
    element("key").focus();
    return;
  }
  if (shown && shown.job.id !== value) {
    shown = null;
    for (const id of ["job-head", "curves", "checkpoints", "events"]) element(id).replaceChildren();
    element("job-title").textContent = "Job";
  }
  await run(async () => {
    if (view === "jobs" || view === "job") await look();
    else if (view === "new") await choices([element("base")]);
    else if (view === "stored") await store();
    else if (view === "chat") {
      const fresh = element("model-1").length === 0;
      const models = await choices([element("model-0"), element("model-1")]);
      const given = value ? decodeURIComponent(value) : fresh ? models.at(-1)?.id : null;
      if (given) element("model-1").value = given;
    }
  });
}

function leave() {
  key = null;
  sessionStorage.removeItem("key");
  element("key").value = "";
  jobs = [];
  jobsShown = "";
  shown = null;
  clear();
  form.file = form.heldout = null;
  for (const id of ["file", "heldout"]) element(id).value = "";
  check();
  for (const id of ["job-list", "job-head", "curves", "checkpoints", "events", "models", "files", "base", "model-0", "model-1"]) element(id).replaceChildren();
  say("");
  show();
}

element("enter").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = element("key").value.trim();
  await run(async () => {
    await json("/v1/models");
    sessionStorage.setItem("key", key);
    await show();
    document.querySelector("main > section:not([hidden]) h2").focus();
  });
});
element("leave").addEventListener("click", leave);
element("refresh").addEventListener("click", () => run(look));
element("more-jobs").addEventListener("click", () => run(async () => {
  const found = await json(`/v1/fine_tuning/jobs?limit=100&after=${jobs.at(-1).id}`);
  jobs.push(...found.data);
  more = found.has_more;
  showJobs();
}));
element("older").addEventListener("click", () => run(async () => {
  const { events, older } = await eventsOf(shown.job.id, undefined, shown.events.at(-1).id, PAGES);
  shown.events.push(...events);
  shown.older = older;
  showJob(true);
}));
for (const which of ["file", "heldout"]) element(which).addEventListener("change", () => run(() => upload(which, element(which).files[0])));
for (const name of ["dragover", "dragleave", "drop"]) {
  element("drop").addEventListener(name, (event) => {
    event.preventDefault();
    element("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) run(() => upload("file", event.dataTransfer.files[0]));
  });
}
element("method").addEventListener("change", () => run(check));
element("job-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!element("start").disabled) run(start);
});
element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!element("send").disabled) run(talk);
});
element("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  element("ask").requestSubmit();
});
element("stop").addEventListener("click", () => talking?.abort());
element("clear").addEventListener("click", clear);
for (const column of [0, 1]) {
  element(`model-${column}`).addEventListener("change", () => {
    chats[column].length = 0; // another model has not said what this one has
    element(`log-${column}`).replaceChildren();
  });
}
addEventListener("hashchange", async () => {
  await show();
  if (key !== null) document.querySelector("main > section:not([hidden]) h2").focus();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && key !== null && !(element("jobs").hidden && element("job").hidden)) poll();
});
show();
