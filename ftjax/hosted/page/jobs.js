// The list of jobs, and the page of one.

// Looks again for as long as something is open.
async function poll() {
  try {
    await look();
    if (lost) element("trouble").textContent = "";
    lost = false;
  } catch (error) {
    lost = true;
    element("trouble").textContent = error.message;
    if (key !== null) timer = setTimeout(poll, 5 * SECONDS * 1000);
  }
}

async function look() {
  clearTimeout(timer);
  const view = ++turn;
  if (key === null || document.hidden) return;
  const found = await json(`/v1/fine_tuning/jobs?limit=${Math.min(100, Math.max(20, jobs.length))}`);
  for (const job of found.data.filter((one) => one.status === "running")) {
    const { data } = await json(`/v1/fine_tuning/jobs/${job.id}/events?limit=10`);
    job.progress = progress(data);
  }
  if (view !== turn) return;
  jobs = found.data;
  more = found.has_more;
  const id = wanted();
  if (id) await lookAt(id, view);
  if (view !== turn) return;
  showJobs();
  const open = jobs.some((job) => OPEN.includes(job.status)) || (shown && OPEN.includes(shown.job.status));
  if (open || wasOpen) timer = setTimeout(poll, SECONDS * 1000); // once more after the last has ended
  wasOpen = open;
}

function progress(events) {
  for (const event of events) {
    const found = event.message.match(/^Step (\d+)\/(\d+)/);
    if (found) return [Number(found[1]), Number(found[2])];
  }
  return null;
}

function bar(job, made_) {
  if (!made_ || job.status === "succeeded") return [];
  const [step, total] = made_;
  const meter = made("progress", "", "", { max: total, value: step, "aria-label": "steps made" });
  return [meter, made("p", `step ${step} of ${total}${step < total ? left(job) : ""}`, "detail")];
}

function left(job) {
  if (!job.estimated_finish) return "";
  const minutes = Math.max(1, Math.ceil((job.estimated_finish - Date.now() / 1000) / 60));
  return `, about ${minutes} min left`;
}

const title = (job) => (job.fine_tuned_model ? short(job.fine_tuned_model) : job.id);

function acts(job) {
  const one = (act) => async () => {
    if (act === "cancel" && !(await sure("Cancel the job?", "Cancel it", `${job.id} saves what it has made, and does not go on.`))) return;
    await json(`/v1/fine_tuning/jobs/${job.id}/${act}`, { method: "POST" });
    await look();
  };
  const allowed = Object.keys(ALLOWED).filter((act) => ALLOWED[act].includes(job.status));
  return allowed.map((act) => button(act[0].toUpperCase() + act.slice(1), title(job), one(act)));
}

function showJobs() {
  const now = JSON.stringify([jobs, more]);
  if (now === jobsShown) return;
  jobsShown = now;
  element("no-jobs").hidden = jobs.length > 0;
  element("more-jobs").hidden = !more;
  fill(element("job-list"), jobs.map((job) => {
    const name = holding("p", "name", made("a", title(job), "", { href: `#job=${job.id}` }));
    const facts = holding("p", "detail", made("span", job.status.replace("_", " "), `status ${job.status}`));
    facts.append(` · ${job.method.type} · from ${short(job.model)} · ${time(job.created_at)}`);
    return holding("li", "", holding("div", "what", name, facts, ...bar(job, job.progress)), holding("div", "acts", ...acts(job)));
  }));
}

async function lookAt(id, view) {
  const job = await json(`/v1/fine_tuning/jobs/${id}`);
  const known = shown?.job.id === id ? shown.events : [];
  const newest = known[0]?.id;
  const { events, older } = await eventsOf(id, newest, undefined, PAGES);
  const checkpoints = await json(`/v1/fine_tuning/jobs/${id}/checkpoints?limit=100`);
  if (view !== turn) return;
  const kept = newest ? shown.older : older;
  shown = { job, events: [...events, ...known], checkpoints: checkpoints.data, older: kept };
  showJob(events.length > 0 || !newest);
}

// Events from the newest, or from after one, until one that is known or so many pages; whether there are older ones.
async function eventsOf(id, known, after, pages) {
  const events = [];
  for (let page = 0; page < pages; page++) {
    const more = after ? `&after=${after}` : "";
    const { data, has_more } = await json(`/v1/fine_tuning/jobs/${id}/events?limit=100${more}`);
    const end = data.findIndex((event) => event.id === known);
    events.push(...(end < 0 ? data : data.slice(0, end)));
    if (end >= 0 || !has_more) return { events, older: false };
    after = data.at(-1).id;
  }
  return { events, older: true };
}

function showJob(changed) {
  const { job, events, checkpoints, older } = shown;
  element("job-title").textContent = `Job ${title(job)}`;
  const facts = made("table", "", "facts");
  const row = (name, value) => facts.append(holding("tr", "", made("th", name, "", { scope: "row" }), made("td", value)));
  const chosen = Object.entries(job.method[job.method.type].hyperparameters).map(([name, value]) => `${name.replace(/^n_/, "").replaceAll("_", " ")} ${value}`);
  row("Status", job.status.replace("_", " "));
  facts.rows[0].cells[1].className = `status ${job.status}`;
  if (job.error?.message) row("Error", job.error.message);
  row("Method", `${job.method.type}: ${chosen.join(", ")}`);
  row("From", short(job.model));
  if (job.fine_tuned_model) row("Model", job.fine_tuned_model);
  row("Created", time(job.created_at));
  if (job.finished_at) row("Finished", time(job.finished_at));
  if (job.trained_tokens) row("Trained tokens", figure(job.trained_tokens));
  const made_ = bar(job, progress(events));
  const results = job.result_files.map((id) => button("Download metrics", title(job), () => save(`/v1/files/${id}/content`, `${job.id}.csv`)));
  const model = checkpoints.some((one) => one.fine_tuned_model_checkpoint === job.fine_tuned_model) ? modelActs(job.fine_tuned_model) : [];
  fill(element("job-head"), [facts, ...made_, holding("div", "acts", ...acts(job), ...model, ...results)]);
  element("no-checkpoints").hidden = checkpoints.length > 0;
  fill(element("checkpoints"), checkpoints.map((one) => {
    const measured = Object.entries(one.metrics).filter(([name]) => !/^(step$|valid_)/.test(name)).map(([name, value]) => `${name.replaceAll("_", " ")} ${figure(value)}`);
    const what = holding("div", "what", made("p", `Step ${one.step_number}`, "name"), made("p", measured.join(" · "), "detail"));
    return holding("li", "", what, holding("div", "acts", ...modelActs(one.fine_tuned_model_checkpoint)));
  }));
  element("older").hidden = !older;
  if (!changed) return;
  element("events").replaceChildren(...events.map((event) => {
    const stamp = made("time", new Date(event.created_at * 1000).toLocaleTimeString(), "", { datetime: new Date(event.created_at * 1000).toISOString() });
    return holding("li", { error: "error", warn: "warning" }[event.level] ?? "", stamp, event.message);
  }));
  const charts = CHARTS.map(([name, series]) => chart(name, Object.entries(series).map(([field, label]) => [label, points(events, field)])));
  const opened = new Set([...document.querySelectorAll("#curves details[open]")].map((one) => one.dataset.name));
  element("curves").replaceChildren(...charts.filter(Boolean));
  for (const one of document.querySelectorAll("#curves details")) one.open = opened.has(one.dataset.name);
  element("no-curves").hidden = element("curves").children.length > 0;
}
