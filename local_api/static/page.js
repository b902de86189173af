// The page of local_api: shows the server's jobs, models and files as they change. Plain JavaScript, no build step.
//
// api.js asks the server, elements.js puts the answers on the page, curve.js draws the loss, playground.js asks models.

import { api, get, hasKey, kindOf, KINDS, setKey } from "./api.js";
import { drawCurve } from "./curve.js";
import { byId, date, duration, el, figure, say, show, size, time } from "./elements.js";
import { drawPlayground, playgroundOf } from "./playground.js";

const VIEWS = ["jobs", "models", "files", "playground"];
const UNFINISHED = ["validating_files", "queued", "running"];
const LIVE_MS = 2000; // between two looks at the server while a job is under way
const IDLE_MS = 10_000; // what the pause grows to while nothing changes
const LOST_MS = 30_000; // what it grows to while the server does not answer
const SHOWN_EVENTS = 500; // of a job with more, the newest

// What the server said last; `read` has the jobs of which nothing more will come, by the status they had then.
const state = { jobs: [], jobLimit: 50, moreJobs: false, files: [], models: [], events: {}, checkpoints: {}, read: {} };

// ----------------------------------------------------------------------------------- looking again and again

let timer, looking = false, lookAgain = false, pause = LIVE_MS, locked = false;

/** Read what is new in a job: its events since the last time and, once it has succeeded, its checkpoints. */
async function readJob(job) {
  if (!job || state.read[job.id] === job.status) return;
  const known = state.events[job.id] ?? []; // newest first, as the API lists them
  const fresh = [];
  for (let after = "", more = true; more; ) {
    const page = await get(`fine_tuning/jobs/${job.id}/events?limit=${known.length ? 100 : 1000}${after}`);
    const end = page.data.findIndex((event) => event.id === known[0]?.id);
    fresh.push(...(end < 0 ? page.data : page.data.slice(0, end)));
    more = end < 0 && page.has_more;
    after = `&after=${page.last_id}`;
  }
  state.events[job.id] = [...fresh, ...known];
  if (job.status === "succeeded") {
    state.checkpoints[job.id] = (await get(`fine_tuning/jobs/${job.id}/checkpoints`)).data;
  }
  if (!UNFINISHED.includes(job.status)) state.read[job.id] = job.status;
}

/** Read what the view needs, draw it, and come back later: soon while a job runs, never while the page is hidden. */
async function update() {
  if (looking) lookAgain = true;
  if (looking || document.hidden || locked) return;
  clearTimeout(timer);
  looking = true;
  try {
    const busy = await readView();
    pause = busy ? LIVE_MS : Math.min(pause * 1.5, IDLE_MS);
    connection("Live");
  } catch (error) {
    pause = Math.min(pause * 2, LOST_MS);
    connection(`${error.status ? error.message : "The server does not answer."} Trying again …`, "bad");
    if (error.status === 401) askForKey();
  }
  looking = false;
  timer = setTimeout(update, lookAgain ? 0 : pause);
  lookAgain = false;
  draw();
}

function connection(sentence, how = "") {
  say("connection", sentence);
  byId("connection").className = how;
}

/** Read jobs and, where they matter, events, models and files; returns whether there will soon be more. */
async function readView() {
  const [view] = where();
  const before = JSON.stringify(state.jobs);
  const page = await get(`fine_tuning/jobs?limit=${state.jobLimit}`);
  [state.jobs, state.moreJobs] = [page.data, page.has_more];
  const changed = JSON.stringify(state.jobs) !== before;
  if (view === "jobs") await readJob(selectedJob());
  if (changed || view !== "jobs" || !state.models.length) {
    state.models = (await get("models")).data.reverse(); // newest first, as jobs and files are
    state.files = (await get("files?limit=1000")).data;
  }
  return changed || state.jobs.some((job) => UNFINISHED.includes(job.status));
}

/** Look at once: the reader has done something, or has come back. */
function updateNow() {
  pause = LIVE_MS;
  update();
}

function askForKey() {
  say("key-problem", hasKey() ? "That is not the key: the server refused it." : "");
  say("connection", "");
  setKey("");
  locked = true;
  draw();
  byId("key-field").focus();
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key-field").value.trim());
  byId("key-field").value = "";
  locked = false;
  updateNow();
});

// ------------------------------------------------------------------------------------------------------ views

/** Return the view and the id that the address names: "#jobs/ftjob-1" is ["jobs", "ftjob-1"]. */
function where() {
  const [view, ...rest] = location.hash.slice(1).split("/");
  let id = rest.join("/");
  try { id = decodeURIComponent(id); } catch { /* an address typed by hand */ }
  return [VIEWS.includes(view) ? view : "jobs", id];
}

function draw() {
  const [view, id] = where();
  byId("key").hidden = !locked;
  for (const name of VIEWS) byId(name).hidden = locked || name !== view;
  for (const link of document.querySelectorAll("header a")) {
    link.ariaCurrent = link.hash === `#${view}` ? "page" : "false";
  }
  if (view === "jobs") drawJobs();
  if (view === "models") drawModels();
  if (view === "files") drawFiles();
  if (view === "playground") drawPlayground(state, id);
}

// ------------------------------------------------------------------------------------------------------- jobs

const selectedJob = () => state.jobs.find((job) => job.id === where()[1]) ?? state.jobs[0];
const jobName = (job) => job.user_provided_suffix || `${job.model} · ${job.id.slice(-6)}`;
const badge = (status) => el("span", { className: `badge ${status}` }, status.replace("_", " "));
const askLink = (model) => el("a", { className: "button", href: playgroundOf(model), id: `ask-${model}` }, "Ask");

function drawJobs() {
  const job = selectedJob();
  byId("older").hidden = !state.moreJobs;
  byId("no-job").hidden = Boolean(job);
  for (const id of ["job-side", "job"]) byId(id).hidden = !job;
  show(byId("job-list"), [state.jobs.map((one) => [one.id, one.status]), job?.id], () => state.jobs.map((one) =>
    el("a", { href: `#jobs/${one.id}`, id: `link-${one.id}`, ...(one === job && { "aria-current": "true" }) },
      el("strong", {}, jobName(one)), badge(one.status), el("small", {}, date(one.created_at)))));
  if (!job) return;
  const events = state.events[job.id] ?? [];
  const metrics = events.filter((event) => event.type === "metrics").map((event) => event.data);
  show(byId("job-head"), [job, metrics[0], state.models], () => jobHead(job, metrics[0]));
  show(byId("checkpoints"), state.checkpoints[job.id] ?? [], checkpointTable);
  show(byId("facts"), [job, state.files], () => [el("h3", {}, "Details"), jobFacts(job)]);
  show(byId("events"), [job.id, events[0]?.id], () => events.slice(0, SHOWN_EVENTS).map((event) =>
    el("li", { className: event.level },
      el("time", {}, time(event.created_at, { timeStyle: "medium" })), el("span", {}, event.message))));
  drawCurve(metrics);
}

function jobHead(job, latest) {
  const { status } = job;
  const path = `fine_tuning/jobs/${job.id}`;
  const cancel = `Cancel the job ${jobName(job)}? What it has learned so far is not kept as a model.`;
  const ready = job.estimated_finish && `, ready at about ${time(job.estimated_finish, { timeStyle: "short" })}`;
  return [
    el("h2", {}, jobName(job), badge(status)),
    job.error?.message && el("p", { className: "card bad", role: "alert" }, job.error.message),
    latest && status !== "succeeded" && el("p", { className: "progress" },
      el("progress", { value: latest.step, max: latest.total_steps, "aria-label": "Training steps" }),
      `Step ${latest.step} of ${latest.total_steps}${ready || ""}`),
    el("p", { className: "line" },
      state.models.some((model) => model.id === job.fine_tuned_model) &&
        el("a", { className: "button primary", href: playgroundOf(job.fine_tuned_model) }, "Ask this model"),
      ["queued", "running"].includes(status) && action("Pause", `${path}/pause`),
      status === "paused" && action("Resume", `${path}/resume`),
      [...UNFINISHED, "paused"].includes(status) && action("Cancel job", `${path}/cancel`, "POST", cancel)),
  ];
}

function checkpointTable(checkpoints) {
  if (!checkpoints.length) return [];
  const [model] = checkpoints[0].fine_tuned_model_checkpoint.split(":ckpt-step-");
  const figures = {
    "Training loss": (metrics) => metrics.train_loss,
    "Validation loss": (metrics) => metrics.full_valid_loss ?? metrics.valid_loss,
    "Validation accuracy": (metrics) => metrics.full_valid_mean_token_accuracy ?? metrics.valid_mean_token_accuracy,
  };
  const known = Object.keys(figures).filter((name) => // without a validation file there is nothing to show of it
    checkpoints.some(({ metrics }) => typeof figures[name](metrics) === "number"));
  const columns = ["Step", ...known, "Try it"];
  const row = ({ step_number, metrics, fine_tuned_model_checkpoint }) => el("tr", {},
    el("th", { scope: "row" }, step_number),
    ...known.map((name) => el("td", {}, figure(figures[name](metrics)))),
    el("td", {}, askLink(fine_tuned_model_checkpoint)));
  return [
    el("h3", {}, "Checkpoints"),
    el("div", { className: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, ...columns.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, ...checkpoints.map(row)))),
    el("small", {}, "Each answers under the name ", el("code", {}, `${model}:ckpt-step-N`), "."),
  ];
}

function jobFacts(job) {
  const { n_epochs, batch_size, learning_rate_multiplier } = job.hyperparameters;
  const file = (id) => id && `${state.files.find((one) => one.id === id)?.filename ?? "deleted"} (${id})`;
  const facts = {
    "Job": job.id,
    "Base model": job.model,
    "Fine-tuned model": job.fine_tuned_model,
    "Created": date(job.created_at),
    "Took": job.finished_at && duration(job.finished_at - job.created_at),
    "Trained tokens": job.trained_tokens?.toLocaleString(),
    "Training file": file(job.training_file),
    "Validation file": file(job.validation_file),
    "Result file": file(job.result_files[0]),
    "Epochs": n_epochs,
    "Batch size": batch_size,
    "Learning rate multiplier": learning_rate_multiplier,
    "Seed": job.seed,
    "Metadata": Object.entries(job.metadata ?? {}).map((pair) => pair.join(": ")).join("\n"),
  };
  const known = Object.entries(facts).filter(([, value]) => value || value === 0);
  return el("dl", {}, ...known.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

// -------------------------------------------------------------------------------------------- models and files

/** A heading and a list under it; each item is a name, what there is to say about it, and its buttons. */
const list = (heading, items) => [el("h2", {}, heading), el("ul", { className: "rows" }, ...items.map(
  ([name, about, ...buttons]) => el("li", {},
    el("div", {}, el("strong", {}, name), el("small", {}, about)), el("div", { className: "line" }, ...buttons))))];

function drawModels() {
  const item = ({ id, created }) => [id, date(created), askLink(id), kindOf(id) !== "Base model" && action("Delete",
    `models/${encodeURIComponent(id)}`, "DELETE",
    `Delete ${id}${kindOf(id) === "Fine-tuned model" ? " and its checkpoints" : ""}? It cannot be brought back.`)];
  show(byId("models"), state.models, () => KINDS.flatMap((kind) => {
    const models = state.models.filter(({ id }) => kindOf(id) === kind);
    return models.length ? list(`${kind}s`, models.map(item)) : [];
  }));
}

function drawFiles() {
  const item = ({ id, filename, purpose, bytes, created_at }) => [filename,
    `${purpose} · ${size(bytes)} · ${date(created_at)} · ${id}`,
    action("Delete", `files/${id}`, "DELETE", `Delete the file ${filename}? It cannot be brought back.`)];
  show(byId("files"), state.files, () => [...list("Files", state.files.map(item)),
    !state.files.length && el("p", { className: "dim" }, "No files yet: fine_tune.py uploads the training file.")]);
}

// ------------------------------------------------------------------- what a reader can change: a few buttons

/** Return a button that asks the API for this, after the reader has confirmed it if there is a question. */
function action(name, path, method = "POST", question = "") {
  return el("button", { id: `${name} ${path}`, onclick: async () => {
    if (question && !(await confirmed(question, name))) return;
    try {
      await api(path, { method });
      say("notice", "");
    } catch (error) {
      say("notice", error.message);
    }
    state.read = {}; // a job's checkpoints may be gone with a model
    updateNow();
  } }, name);
}

function confirmed(question, verb) {
  const dialog = byId("confirm");
  say("confirm-question", question);
  say("confirm-yes", verb);
  dialog.returnValue = "no"; // what it stays with Escape
  dialog.showModal();
  return new Promise((resolve) => {
    // While it is open, the event is that of an earlier question, come late.
    dialog.onclose = () => { if (!dialog.open) resolve(dialog.returnValue === "yes"); };
  });
}

// ------------------------------------------------------------------------------------------------------- start

byId("base-url").textContent = `${location.origin}/v1`;
byId("older").addEventListener("click", () => { state.jobLimit += 50; updateNow(); });
addEventListener("hashchange", () => {
  say("notice", "");
  draw();
  updateNow();
});
addEventListener("visibilitychange", () => { if (!document.hidden) updateNow(); });
update();
