// The page: a form made from the host's schema (form.js), one event stream for each job of this
// browser, no library, no build step.
"use strict";

const POLL_MS = 2000;
const MAX_FOLLOWED = 3; // a browser opens six connections to a host; the others are for all else
const MAX_KEPT = 64; // as many finished jobs as the host keeps
const sessionJobs = new Map(); // id -> {settings, images, files, outputs, number, url, blob, preview, job, tile}
const followed = new Set(); // ids with an open event stream
const PATIENCE_MS = 120000; // how long a job may be out of reach while its host restarts
const PASSING = [0, 429, 502, 503, 504]; // no answer, or a status that says to ask again later
let shown = null; // the job on the stage
let isChosen = false; // by a click: the stage then stays on it
const SHARED = ["prompt", "negative_prompt", "seed"]; // what stays when the model is changed
let pageName = "diffusion-launcher";

let key = sessionStorage.getItem("key") || "";

async function ask(path, options = {}) {
  let given = key;
  let answer = await send(path, options, given);
  while (answer.status === 401) {
    if (key === given && !askForKey()) break;
    given = key;
    answer = await send(path, options, given);
  }
  if (answer.ok) return answer;
  const { message } = await answer.json().catch(() => ({}));
  throw failure(message || `The host answered ${answer.status}.`, answer.status);
}

function send(path, options, given) {
  const authorization = given ? { Authorization: `Bearer ${given}` } : {};
  const headers = { ...options.headers, ...authorization };
  return fetch(path, { ...options, headers }).catch((error) => {
    throw failure(`The host does not answer: ${error.message}`, 0);
  });
}

function askForKey() {
  const answer = window.prompt("This host requires its API key (--api_key):");
  if (answer) sessionStorage.setItem("key", (key = answer));
  return answer;
}

const failure = (message, status) => Object.assign(new Error(message), { status });
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// ask again while the host restarts
async function patiently(act) {
  for (const until = Date.now() + PATIENCE_MS; ; await pause(POLL_MS)) {
    try {
      return await act();
    } catch (error) {
      if (!PASSING.includes(error.status) || Date.now() > until) throw error;
    }
  }
}

const api = async (path, options) => (await ask(path, options)).json();

// the ids and settings of this browser's jobs; the images stay on the host
function recall() {
  try {
    const records = JSON.parse(localStorage.getItem("jobs") || "[]");
    return Array.isArray(records) ? records : [];
  } catch {
    return []; // storage is blocked, or holds something else
  }
}

function remember(records) {
  try {
    localStorage.setItem("jobs", JSON.stringify(records.slice(-MAX_KEPT)));
  } catch {
    // storage is blocked or full: the history then ends with the page
  }
}

async function generate(event) {
  event.preventDefault();
  showError(null);
  showNote("");
  try {
    checkForm();
    const settings = formSettings();
    const files = chosenFiles();
    const body = { ...settings };
    for (const [field, file] of Object.entries(files)) {
      const many = Array.isArray(file);
      body[field] = many ? await Promise.all(file.map(asBase64)) : await asBase64(file);
    }
    for (const seed of seedsOf(settings)) await submit({ ...body, ...seed }, settings, files);
  } catch (error) {
    showError(error);
  }
}

// one for each image: the chosen seed and those after it, or none, for seeds by chance
function seedsOf({ seed }) {
  const count = byId("count");
  if (!count.validity.valid || !count.value) throw new Error("Images: choose a number from 1 to 16.");
  const numbers = Array.from({ length: Number(count.value) }, (_, index) => index);
  return numbers.map((index) => (seed === undefined || seed < 0 ? {} : { seed: seed + index }));
}

async function submit(body, settings, files) {
  const headers = { "Content-Type": "application/json" };
  const job = await api("v1/jobs", { method: "POST", headers, body: JSON.stringify(body) });
  accept(job, settings, files);
}

function accept(job, settings, files) {
  const images = Object.keys(files);
  const record = { id: job.id, settings: { ...settings, seed: job.seed }, images };
  sessionJobs.set(job.id, { ...record, files, url: null, job });
  remember([...recall(), record]);
  const current = sessionJobs.get(shown);
  if (current && !isOver(current.job)) showNote("Added to the queue.");
  else stage(job.id, false);
  byId("stage").scrollIntoView({ block: "nearest" });
  followWaiting();
  refresh();
}

function followWaiting() {
  for (const [id, { job }] of sessionJobs) {
    if (isOver(job) || followed.has(id) || followed.size >= MAX_FOLLOWED) continue;
    followed.add(id);
    follow(job).catch(showError).finally(() => followed.delete(id));
  }
}

// a broken stream is no end of the job: the host goes on with it after a restart
async function follow(job) {
  for (;;) {
    await listen(job).catch((error) => {
      if (!PASSING.includes(error.status)) throw error;
    });
    if (isOver(sessionJobs.get(job.id).job)) return;
    await pause(POLL_MS);
    await heard(job.id, "status", await patiently(() => api(job.links.self.slice(1))));
    if (isOver(sessionJobs.get(job.id).job)) return;
  }
}

// not an EventSource: that cannot send a key
async function listen(job) {
  const reader = (await ask(`${job.links.events.slice(1)}?previews=1`)).body.pipeThrough(new TextDecoderStream()).getReader();
  const read = () =>
    reader.read().catch((error) => {
      throw failure(`the events ended: ${error.message}`, 0);
    });
  let text = "";
  for (let part = await read(); !part.done; part = await read()) {
    const events = (text + part.value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const match = /^event: (\w+)\ndata: (.*)$/.exec(event);
      if (match) await heard(job.id, match[1], JSON.parse(match[2]));
    }
  }
}

async function heard(id, name, data) {
  const entry = sessionJobs.get(id);
  if (name === "preview") entry.preview = data.image;
  else entry.job = data;
  if (name === "status" && data.state === "done") await collect(data);
  if (name === "status" && isOver(data)) ended(id);
  if (data.state === "running" && shown !== id && !isChosen) stageNext(id);
  if (shown === id) paint();
  paintTabTitle();
}

const isOver = (job) => ["done", "failed", "cancelled", "gone"].includes(job.state);

// the stage goes on to the next job once the one on it is over
function stageNext(id) {
  const current = sessionJobs.get(shown);
  if (!current || isOver(current.job)) stage(id, false);
}

// all images of the call: one for most models, one for each layer for others
async function outputs(job) {
  const path = job.links.result.slice(1);
  const answer = await ask(path);
  const blobs = [await blobOf(answer)];
  const count = isVideo({ blob: blobs[0] }) ? 1 : Number(answer.headers.get("X-Images"));
  while (blobs.length < count) blobs.push(await blobOf(await ask(`${path}?image=${blobs.length}`)));
  return blobs.map((blob) => ({ blob, url: URL.createObjectURL(blob) }));
}

const blobOf = (answer) =>
  answer.blob().catch((error) => {
    throw failure(`the file broke off: ${error.message}`, 0);
  });

async function collect(job) {
  const entry = sessionJobs.get(job.id);
  entry.outputs = await patiently(() => outputs(job));
  show(entry, 0);
}

const show = (entry, number) => Object.assign(entry, { number }, entry.outputs[number]);

function showNext() {
  const entry = sessionJobs.get(shown);
  show(entry, (entry.number + 1) % entry.outputs.length);
  paint();
}

function ended(id) {
  const { job } = sessionJobs.get(id);
  if (job.state === "failed") showError(new Error(job.error));
  showTile(id);
  refresh();
}

const promptOf = ({ settings }) => settings.prompt || "no prompt";

function showTile(id) {
  const entry = sessionJobs.get(id);
  if (entry.job.state === "cancelled") return;
  if (!entry.tile) byId("gallery").prepend((entry.tile = make("li")));
  const words = [promptOf(entry), `seed ${entry.job.seed}`];
  const spans = words.map((textContent) => make("span", { textContent }));
  const facts = { type: "button", title: promptOf(entry) };
  const button = make("button", facts, tileImage(entry), ...spans);
  button.addEventListener("click", () => choose(id));
  entry.tile.replaceChildren(button);
  byId("no-history").hidden = true;
  byId("forget").hidden = false;
}

const isVideo = ({ blob }) => Boolean(blob?.type.startsWith("video/"));

function tileImage(entry) {
  const { url, job } = entry;
  if (!url) return make("div", { textContent: STATES[job.state] || "Loading" });
  if (isVideo(entry)) return make("video", { src: url, muted: true, loop: true });
  return make("img", { src: url, alt: "" });
}

function choose(id) {
  const { job } = sessionJobs.get(id);
  showError(job.state === "failed" ? new Error(job.error) : null);
  stage(id, true);
  byId("stage").scrollIntoView({ block: "nearest" });
}

function stage(id, byClick) {
  shown = id;
  isChosen = byClick;
  showNote("");
  paint();
}

function paint() {
  const entry = sessionJobs.get(shown);
  const { job } = entry;
  const { width = 1, height = 1 } = entry.settings;
  byId("canvas").style.aspectRatio = `${width} / ${height}`; // its final place from the first step
  if (entry.url || entry.preview) paintImage(entry);
  else byId("canvas").replaceChildren(make("p", { id: "empty", textContent: emptyText(job) }));
  byId("progress").hidden = isOver(job);
  byId("progress").value = percentOf(job);
  byId("caption").textContent = captionOf(entry.job);
  byId("cancel").hidden = isOver(job);
  byId("again").hidden = false;
  byId("as-input").hidden = !entry.url || isVideo(entry) || !inputField();
  byId("download").hidden = !entry.url;
  const several = entry.outputs?.length > 1;
  byId("next").hidden = !several;
  if (several) byId("next").textContent = `Image ${entry.number + 1} of ${entry.outputs.length}: show the next`;
  const suffix = several ? `-${entry.number + 1}` : "";
  const download = `${job.id}${suffix}.${isVideo(entry) ? "mp4" : "png"}`;
  if (entry.url) Object.assign(byId("download"), { href: entry.url, download });
}

function paintImage(entry) {
  const source = entry.url || entry.preview;
  let image = byId("canvas").firstElementChild;
  if (image.tagName !== (isVideo(entry) ? "VIDEO" : "IMG")) {
    const player = { controls: true, loop: true, autoplay: true, muted: true };
    image = isVideo(entry) ? make("video", player) : make("img");
    byId("canvas").replaceChildren(image);
  }
  if (image.src !== source) image.src = source;
  if (isVideo(entry)) return;
  image.alt = entry.url ? promptOf(entry) : "preview";
  image.className = entry.url ? "" : "preview";
}

const STATES = { cancelled: "Cancelled", failed: "Failed", gone: "No longer on the host" };
const EMPTY = {
  cancelled: "This job was cancelled.",
  failed: "This job failed. The reason is below the Generate button.",
  gone: "The host no longer has this image. Use again generates it anew.",
};
const emptyText = (job) => EMPTY[job.state] || "Your image appears here.";
const percentOf = (job) => (job.steps ? Math.round((100 * job.step) / job.steps) : 0);

function captionOf(job) {
  if (job.state === "queued") {
    return `Waiting: ${job.position} ${job.position === 1 ? "job" : "jobs"} ahead`;
  }
  if (job.state === "running") {
    const left = job.eta === null ? "" : `, about ${Math.ceil(job.eta)} s left`;
    return job.steps ? `Step ${job.step} of ${job.steps}${left}` : "Starting";
  }
  if (!job.settings) return STATES[job.state] || "";
  const { width, height, num_inference_steps: steps, guidance_scale, scheduler } = job.settings;
  const how = job.exactness === "approximate" ? ", approximate" : "";
  const what = `${width}x${height}, ${steps} steps, guidance ${guidance_scale}, ${scheduler}`;
  const facts = `${what}, seed ${job.seed}, ${job.seconds.toFixed(1)} s${how}`;
  return [facts, ...(job.notes || [])].join(". ");
}

function paintTabTitle() {
  const running = [...sessionJobs.values()].find(({ job }) => job.state === "running");
  document.title = running ? `${percentOf(running.job)} % \u00b7 ${pageName}` : pageName;
}

async function cancel(id) {
  try {
    await api(`v1/jobs/${id}`, { method: "DELETE" });
    refresh();
  } catch (error) {
    showError(error);
  }
}

async function useAgain() {
  const { settings, files, images } = sessionJobs.get(shown);
  const choice = byId("field-model");
  if (choice && settings.model && choice.value !== settings.model) await loadForm(settings.model);
  fillForm(settings, files);
  const missing = images.filter((field) => !files[field]).map(title);
  showNote(missing.length ? `Choose the image again for: ${missing.join(", ")}.` : "");
  toField(byId("field-prompt") || inputField());
}

const inputField = () => byId("field-init_image") || byId("field-image");

function useAsInput() {
  const { blob } = sessionJobs.get(shown);
  setFile(inputField(), new File([blob], `${shown}.png`, { type: blob.type }));
  toField(inputField());
}

function toField(field) {
  field.focus({ preventScroll: true });
  field.scrollIntoView({ block: "center" });
}

function forget() {
  const isPending = ({ id }) => sessionJobs.has(id) && !isOver(sessionJobs.get(id).job);
  remember(recall().filter(isPending));
  for (const [id, { job }] of sessionJobs) if (isOver(job)) drop(id);
  byId("no-history").hidden = false;
  byId("forget").hidden = true;
}

function drop(id) {
  sessionJobs.get(id).tile?.remove();
  sessionJobs.get(id).tile = null;
  if (id !== shown) sessionJobs.delete(id);
}

// the jobs that this browser made before the page was loaded
async function restore() {
  const records = recall(); // not those that are accepted meanwhile, which the answer may lack
  const { jobs } = await api("v1/jobs");
  const known = new Map(jobs.map((job) => [job.id, job]));
  for (const { id, settings, images } of records) {
    const job = known.get(id) || { id, state: "gone", seed: settings.seed };
    sessionJobs.set(id, { settings, images, files: {}, url: null, job });
    if (isOver(job)) showTile(id);
    else stageNext(id);
  }
}

async function restoreResults() {
  for (const id of [...sessionJobs.keys()].reverse()) await restoreResult(id);
}

async function restoreResult(id) {
  const entry = sessionJobs.get(id);
  if (entry?.job.state !== "done" || entry.url) return;
  try {
    entry.job = await api(`v1/jobs/${id}`);
    await collect(entry.job);
  } catch {
    entry.job = { ...entry.job, state: "gone" };
  }
  showTile(id);
  if (shown === id) paint();
}

// a line stays the same element while it is there, so that its buttons keep the focus
function showQueue(jobs) {
  const waiting = jobs.filter((job) => job.state === "running" || job.state === "queued");
  const old = new Map([...byId("queue").children].map((line) => [line.dataset.id, line]));
  const lines = waiting.map((job) => {
    const before = old.get(job.id);
    const isOwn = sessionJobs.has(job.id);
    const line = before && isOwn === (before.dataset.own === "true") ? before : queueLine(job.id);
    line.firstElementChild.textContent = captionOf(job);
    return line;
  });
  const isSame = lines.every((line, i) => line === byId("queue").children[i]);
  if (!isSame || lines.length !== old.size) byId("queue").replaceChildren(...lines);
  byId("queue-empty").hidden = lines.length > 0;
}

function queueLine(id) {
  const line = make("li", {}, make("span", { className: "state" }));
  const entry = sessionJobs.get(id);
  Object.assign(line.dataset, { id, own: Boolean(entry) });
  if (!entry) {
    line.append(make("span", { className: "hint", textContent: "another client's job" }));
    return line;
  }
  const link = make("a", { href: "#stage", textContent: promptOf(entry), title: promptOf(entry) });
  link.addEventListener("click", () => choose(id));
  const button = make("button", { type: "button", className: "quiet bad", textContent: "Cancel" });
  button.setAttribute("aria-label", `Cancel: ${promptOf(entry)}`);
  button.addEventListener("click", () => cancel(id));
  line.append(link, button);
  return line;
}

// of jobs without an event stream
function takeStates(jobs) {
  for (const job of jobs) {
    const entry = sessionJobs.get(job.id);
    if (!entry || followed.has(job.id) || isOver(job) || isOver(entry.job)) continue;
    entry.job = job;
    if (shown === job.id) paint();
  }
}

// jobs that the host has lost would wait for ever
function markGone(jobs, askedFor) {
  const known = new Set(jobs.map((job) => job.id));
  for (const id of askedFor.filter((one) => sessionJobs.has(one) && !known.has(one))) {
    const entry = sessionJobs.get(id);
    if (isOver(entry.job)) continue;
    entry.job = { ...entry.job, state: "gone" };
    showTile(id);
    if (shown === id) paint();
  }
}

function megabytes(bytes) {
  return bytes === undefined ? "" : `${(bytes / 1e6).toFixed(bytes < 1e7 ? 2 : 0)} MB`;
}

function share(part, whole) {
  return part === undefined || !whole ? "" : `${Math.round((100 * part) / whole)} %`;
}

async function refresh() {
  try {
    const asked = [...sessionJobs.keys()];
    const health = fetch("healthz").then((answer) => answer.json());
    const answers = await Promise.all([api("settings"), health, api("v1/jobs")]);
    const [settings, { phase, reason }, { jobs }] = answers;
    byId("host").textContent = phase + (reason ? `: ${reason}` : "");
    showOperator(settings);
    takeStates(jobs);
    showQueue(jobs);
    markGone(jobs, asked);
    followWaiting();
    paintTabTitle();
  } catch {
    byId("host").textContent = "The host does not answer";
  }
}

function showOperator(settings) {
  const reasons = (settings.reasons || []).join(". ");
  const { type, backend, exactness } = settings;
  byId("plan").textContent = backend ? `${type}, ${backend}, ${exactness}. ${reasons}` : type;
  const rows = (settings.ranks_now || []).map((rank) => {
    const busy = rank.seconds - (rank.wait_s || 0);
    const shares = [share(busy, rank.seconds), share(rank.wait_s, rank.seconds)];
    const [memory, sent] = [megabytes(rank.memory_bytes), megabytes(rank.sent_bytes)];
    const cells = [rank.rank, rank.device, memory, ...shares, sent];
    return make("tr", {}, ...cells.map((text) => make("td", { textContent: text })));
  });
  byId("ranks").replaceChildren(...rows);
}

async function loadForm(model = "") {
  const schema = await api(`openapi.json${model ? `?model=${encodeURIComponent(model)}` : ""}`);
  pageName = byId("title").textContent = document.title = schema.info.title;
  buildForm(schema.components.schemas.Request, model);
}

async function changeModel(model) {
  const settings = formSettings();
  const kept = SHARED.filter((name) => name in settings);
  try {
    await loadForm(model);
    for (const name of kept.filter((one) => byId(`field-${one}`))) byId(`field-${name}`).value = settings[name];
    byId("field-model").focus();
  } catch (error) {
    showError(error);
  }
}

async function start() {
  byId("form").addEventListener("submit", generate);
  byId("cancel").addEventListener("click", () => cancel(shown));
  byId("next").addEventListener("click", showNext);
  byId("again").addEventListener("click", () => useAgain().catch(showError));
  byId("as-input").addEventListener("click", useAsInput);
  byId("forget").addEventListener("click", forget);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
  });
  document.addEventListener("paste", paste);
  byId("png").addEventListener("change", () => takeSettings(byId("png")));
  await loadForm();
  await restore();
  await refresh();
  setInterval(refresh, POLL_MS);
  await restoreResults();
}

start().catch((error) => {
  byId("host").textContent = "Not connected. Reload the page to try again.";
  showError(error);
});
