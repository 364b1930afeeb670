// The page: a form made from the host's schema, one event stream for each job of this session, no library, no build step.
"use strict";

const byId = (id) => document.getElementById(id);
const FIRST = ["prompt", "negative_prompt", "image", "init_image", "mask_image", "ip_adapter_image", "control_image", "width", "height", "num_inference_steps", "guidance_scale", "num_frames", "seed", "scheduler"];
const MORE = ["strength", "clip_skip", "warmup_steps", "controlnet_conditioning_scale", "motion_bucket_id", "noise_aug_strength", "lora"];
const LONG = ["prompt", "negative_prompt"];
const IMAGES = ["image", "init_image", "mask_image", "ip_adapter_image", "control_image"];
const POLL_MS = 2000;
const PATIENCE_MS = 120000; // how long a job may be out of reach while its host restarts
const PASSING = [0, 429, 502, 503, 504]; // nobody answered, or a status that says to ask again later
const sessionJobs = new Map(); // id -> {settings, url, job}
let shown = null; // the job on the stage
let output = "image";

let key = sessionStorage.getItem("key") || "";

async function ask(path, options = {}) {
  const send = () =>
    fetch(path, { ...options, headers: { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) } }).catch((error) => {
      throw failure(`the host does not answer: ${error.message}`, 0);
    });
  let answer = await send();
  if (answer.status === 401) {
    key = window.prompt("This host wants its key (--api_key)") || "";
    sessionStorage.setItem("key", key);
    answer = await send();
  }
  if (!answer.ok) {
    const { message } = await answer.json().catch(() => ({}));
    throw failure(message || `the host answered ${answer.status}`, answer.status);
  }
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

function make(tag, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
}

function kindOf(facts) {
  return facts.type || (facts.anyOf || []).map((one) => one.type).find((type) => type !== "null");
}

function limitsOf(facts) {
  return facts.type ? facts : (facts.anyOf || []).find((one) => one.minimum !== undefined || one.maximum !== undefined) || {};
}

function control(name, facts) {
  const common = { name, id: `field-${name}`, title: facts.description || "" };
  if (LONG.includes(name)) return make("textarea", { ...common, rows: name === "prompt" ? 3 : 2 });
  if (IMAGES.includes(name)) return make("input", { ...common, type: "file", accept: "image/png,image/jpeg,image/webp" });
  if (name === "scheduler") {
    const choices = (facts.examples || []).map((text) => make("option", { textContent: text, value: text }));
    return make("select", common, make("option", { textContent: "the model's own", value: "" }), ...choices);
  }
  const kind = kindOf(facts);
  if (kind !== "integer" && kind !== "number") return make("input", { ...common, type: "text", autocomplete: "off" });
  const limits = limitsOf(facts);
  const step = kind === "integer" ? (name === "width" || name === "height" ? 8 : 1) : "any";
  const field = make("input", { ...common, type: "number", step, placeholder: name === "seed" ? "random" : "" });
  if (limits.minimum !== undefined) field.min = limits.minimum;
  if (limits.maximum !== undefined) field.max = limits.maximum;
  if (typeof facts.default === "number") field.value = facts.default;
  return field;
}

function title(name) {
  const text = name.replace("num_inference_", "").replace("_scale", "").replaceAll("_", " ");
  return text[0].toUpperCase() + text.slice(1);
}

async function buildForm() {
  const schema = (await api("openapi.json")).components.schemas.Request;
  const add = (names, into) => {
    let pair = null;
    for (const name of names.filter((one) => one in schema.properties)) {
      const field = control(name, schema.properties[name]);
      field.required = (schema.required || []).includes(name);
      const label = make("label", { htmlFor: field.id }, title(name), field);
      const isSmall = field.tagName === "SELECT" || field.type === "number";
      if (!isSmall) { into.append(label); pair = null; continue; }
      if (!pair || pair.childElementCount === 2) into.append((pair = make("div", { className: "pair" })));
      pair.append(label);
    }
  };
  add(FIRST, byId("fields"));
  add(MORE, byId("more-fields"));
  byId("more").hidden = !byId("more-fields").childElementCount;
  byId("field-prompt")?.focus();
}

function asBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function formValues() {
  const values = {};
  for (const field of byId("form").elements) {
    if (!field.name) continue;
    if (field.type === "file") {
      if (field.files.length) values[field.name] = await asBase64(field.files[0]);
    } else if (field.value !== "") {
      values[field.name] = field.type === "number" ? Number(field.value) : field.name === "lora" ? JSON.parse(field.value) : field.value;
    }
  }
  if (!values.init_image) delete values.strength;
  return values;
}

function showError(error) {
  byId("error").textContent = error ? error.message : "";
  byId("error").hidden = !error;
}

async function draw(event) {
  event.preventDefault();
  showError(null);
  try {
    const values = await formValues();
    const job = await api("v1/jobs", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values) });
    sessionJobs.set(job.id, { settings: { prompt: values.prompt || "" }, url: null, job });
    stage(job.id);
    follow(job).catch(showError);
    refresh();
  } catch (error) {
    showError(error);
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
  if (name === "status" && isOver(data)) refresh();
  if (shown === id) paint();
}

const isOver = (job) => ["done", "failed", "cancelled"].includes(job.state);

async function file(job) {
  const answer = await ask(job.links.result.slice(1));
  return answer.blob().catch((error) => {
    throw failure(`the file broke off: ${error.message}`, 0);
  });
}

async function collect(job) {
  const entry = sessionJobs.get(job.id);
  entry.url = URL.createObjectURL(await patiently(() => file(job)));
  entry.settings = job.settings;
  const image = output === "video" ? make("video", { src: entry.url, muted: true, loop: true }) : make("img", { src: entry.url, alt: job.settings.prompt || "result" });
  const button = make("button", { type: "button", title: JSON.stringify(job.settings) }, image, make("span", { textContent: job.settings.prompt || job.id }));
  button.addEventListener("click", () => stage(job.id));
  byId("gallery").prepend(make("li", {}, button));
}

function stage(id) {
  shown = id;
  paint();
}

function paint() {
  const entry = sessionJobs.get(shown);
  const { job } = entry;
  const source = entry.url || entry.preview;
  if (source) {
    const isVideo = output === "video" && entry.url;
    const tag = isVideo ? "VIDEO" : "IMG";
    let image = byId("canvas").firstElementChild;
    if (image.tagName !== tag) {
      image = isVideo ? make("video", { controls: true, loop: true, autoplay: true, muted: true }) : make("img", {});
      byId("canvas").replaceChildren(image);
    }
    if (image.src !== source) image.src = source;
    if (!isVideo) {
      image.alt = entry.url ? entry.settings.prompt || "result" : "preview";
      image.className = entry.url ? "" : "preview";
    }
  } else {
    byId("canvas").replaceChildren(make("p", { id: "empty", textContent: job.error || "The image appears here while it is drawn." }));
  }
  byId("progress").hidden = isOver(job);
  byId("progress").value = job.steps ? (100 * job.step) / job.steps : 0;
  byId("caption").textContent = captionOf(entry);
  byId("cancel").hidden = isOver(job);
  byId("download").hidden = !entry.url;
  if (entry.url) Object.assign(byId("download"), { href: entry.url, download: `${job.id}.${output === "video" ? "mp4" : "png"}` });
}

function captionOf({ job, settings }) {
  if (job.state === "queued") return `waiting, ${job.position} before it`;
  if (job.state === "running") return `step ${job.step} of ${job.steps || "?"}${job.eta === null ? "" : `, about ${Math.ceil(job.eta)} s left`}`;
  if (job.state !== "done") return `${job.state}: ${job.error}`;
  const size = `${settings.width}x${settings.height}`;
  return `${size}, ${settings.num_inference_steps} steps, guidance ${settings.guidance_scale}, ${settings.scheduler}, seed ${job.seed}, ${job.seconds.toFixed(1)} s, ${job.exactness}`;
}

async function cancel() {
  try {
    await api(`v1/jobs/${shown}`, { method: "DELETE" });
  } catch (error) {
    showError(error);
  }
}

const megabytes = (bytes) => (bytes === undefined ? "" : `${(bytes / 1e6).toFixed(bytes < 1e7 ? 2 : 0)} MB`);
const share = (part, whole) => (part === undefined || !whole ? "" : `${Math.round((100 * part) / whole)} %`);

async function refresh() {
  try {
    const [settings, health, { jobs }] = await Promise.all([api("settings"), fetch("healthz").then((answer) => answer.json()), api("v1/jobs")]);
    byId("title").textContent = `${settings.type} on ${settings.ranks ?? "?"} rank${settings.ranks === 1 ? "" : "s"}`;
    byId("host").textContent = health.phase + (health.reason ? `: ${health.reason}` : "");
    byId("plan").textContent = settings.backend ? `${settings.backend}, ${settings.exactness}. ${(settings.reasons || []).join(". ")}` : "";
    const rows = (settings.ranks_now || []).map((rank) => {
      const cells = [rank.rank, rank.device, megabytes(rank.memory_bytes), share(rank.seconds - (rank.wait_s || 0), rank.seconds), share(rank.wait_s, rank.seconds), megabytes(rank.sent_bytes)];
      return make("tr", {}, ...cells.map((text) => make("td", { textContent: text })));
    });
    byId("ranks").replaceChildren(...rows);
    const waiting = jobs.filter((job) => job.state === "running" || job.state === "queued");
    const lines = waiting.map((job) => make("li", { textContent: `${sessionJobs.has(job.id) ? "yours" : "another client's"}: ${captionOf({ job, settings: {} })}` }));
    byId("queue").replaceChildren(...(lines.length ? lines : [make("li", { textContent: "nothing waits", className: "hint" })]));
  } catch {
    byId("host").textContent = "the host does not answer";
  }
}

async function start() {
  byId("form").addEventListener("submit", draw);
  byId("cancel").addEventListener("click", cancel);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
  });
  output = "video/mp4" in (await api("openapi.json")).paths["/v1/jobs/{id}/result"].get.responses["200"].content ? "video" : "image";
  await buildForm();
  await refresh();
  setInterval(refresh, POLL_MS);
}

start().catch(showError);
