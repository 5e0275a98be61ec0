// A new job.

const form = { file: null, heldout: null, checking: null };

async function upload(which, picked) {
  form.checking?.abort();
  form[which] = null;
  element("start").disabled = true;
  const state = element(`${which}-state`);
  if (!picked) {
    state.textContent = which === "file" ? "No file yet." : "";
    return check();
  }
  state.textContent = `Uploading ${picked.name} (${size(picked.size)}) ...`;
  const body = new FormData();
  body.append("purpose", "fine-tune");
  body.append("file", picked, picked.name);
  try {
    form[which] = await json("/v1/files", { method: "POST", body });
  } catch (error) {
    state.textContent = `${picked.name} is not taken.`;
    element("findings").replaceChildren();
    element("check-state").textContent = "";
    throw error;
  }
  return check();
}

async function check() {
  form.checking?.abort();
  element("start").disabled = true;
  element("findings").replaceChildren();
  element("figures").hidden = true;
  for (const which of ["file", "heldout"]) {
    const file = form[which];
    if (file) element(`${which}-state`).textContent = `${file.filename}, ${size(file.bytes)} (${file.id})`;
  }
  const said = element("check-state");
  said.className = "";
  said.textContent = "Choose a file; its rows are checked before anything starts.";
  if (form.file === null) return;
  const aborted = (form.checking = new AbortController());
  said.textContent = `The rows of ${form.file.filename} are being checked. This may take a minute.`;
  element("check").setAttribute("aria-busy", "true");
  const body = { method: element("method").value };
  if (form.heldout) body.validation_file = form.heldout.id;
  try {
    const found = await json(`/v1/ftjax/files/${form.file.id}/check`, { method: "POST", body, signal: aborted.signal });
    showCheck(found);
  } catch (error) {
    if (error.name !== "AbortError") said.textContent = "The rows were not checked.";
    throw error;
  } finally {
    if (form.checking === aborted) element("check").setAttribute("aria-busy", "false");
  }
}

function showCheck({ passed, findings, figures, auto }) {
  const errors = findings.filter((one) => one.severity === "error").length;
  const warnings = findings.length - errors;
  const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
  const said = element("check-state");
  said.className = passed ? "passed" : "error";
  said.textContent = passed
    ? `The job can start${warnings ? `; read ${count(warnings, "warning")} first` : ": nothing was found"}.`
    : `The job cannot start: ${count(errors, "error")}${warnings ? ` and ${count(warnings, "warning")}` : ""}.`;
  element("findings").replaceChildren(...findings.map((one) => {
    const kind = made("b", `${one.severity}: `, one.severity === "error" ? "error" : "warning");
    return holding("li", "", kind, one.message);
  }));
  const rows = [["Rows", figures.rows], ["Used", figures.used], ["Cut to the longest length", figures.truncated], ["Tokens of an epoch", figures.tokens], ["Of them trained on", figures.trained]];
  const filled = rows.filter(([, value]) => value !== undefined).map(([name, value]) => holding("tr", "", made("th", name, "", { scope: "row" }), made("td", figure(value))));
  element("figures").tBodies[0].replaceChildren(...filled);
  element("figures").hidden = filled.length === 0;
  element("n_epochs").placeholder = auto.n_epochs ? `auto (${Math.ceil(auto.n_epochs)})` : "auto";
  element("batch_size").placeholder = auto.batch_size ? `auto (${auto.batch_size})` : "auto";
  element("start").disabled = !passed;
}

async function start() {
  const method = element("method").value;
  const hyperparameters = {};
  for (const name of ["n_epochs", "batch_size", "learning_rate_multiplier"]) {
    const given = element(name).value.trim();
    if (given && given !== "auto") hyperparameters[name] = Number(given);
  }
  const body = { model: element("base").value, training_file: form.file.id, method: { type: method, [method]: { hyperparameters } } };
  if (form.heldout) body.validation_file = form.heldout.id;
  if (element("suffix").value) body.suffix = element("suffix").value;
  element("start").disabled = true;
  try {
    const job = await json("/v1/fine_tuning/jobs", { method: "POST", body });
    say(`Job ${job.id} is created.`);
    location.hash = `job=${job.id}`;
  } finally {
    element("start").disabled = false;
  }
}

async function choices(selects) {
  const { data } = await json("/v1/models");
  for (const select of selects) {
    const before = select.value;
    select.replaceChildren(...data.map(({ id }) => made("option", short(id), "", { value: id, title: id })));
    if (data.some(({ id }) => id === before)) select.value = before;
  }
  return data;
}
