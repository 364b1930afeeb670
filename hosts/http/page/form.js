// The form, made from the host's schema: fields, image fields, checks, values in and out.
"use strict";

const byId = (id) => document.getElementById(id);
const FIRST = ["model", "prompt", "image"];
const USUAL = [
  "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "num_frames",
  "seed", "scheduler", "init_image", "mask_image", "ip_adapter_image", "control_image",
];
const MORE = [
  "fps", "clip_skip", "warmup_steps", "controlnet_conditioning_scale", "motion_bucket_id",
  "noise_aug_strength", "lora",
];
const BESIDE = { init_image: "strength" }; // image field -> the number that goes with it
const LONG = ["prompt", "negative_prompt"];
const IMAGES = ["image", "init_image", "mask_image", "ip_adapter_image", "control_image"];
const IMAGE_TYPES = ["image/png", "image/jpeg", "image/webp"];
const TITLES = {
  image: "Image", init_image: "Input image", mask_image: "Mask", lora: "LoRA",
  ip_adapter_image: "IP-Adapter image", control_image: "ControlNet image",
  controlnet_conditioning_scale: "ControlNet weight", num_inference_steps: "Steps",
  guidance_scale: "Guidance", num_frames: "Frames", fps: "Frames per second", scheduler: "Sampler",
  motion_bucket_id: "Motion", noise_aug_strength: "Noise on the image",
};
const HINTS = {
  strength: "0 keeps the input image, 1 ignores it",
  mask_image: "White may change, black stays",
};

function make(tag, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
}

function kindOf(facts) {
  return facts.type || (facts.anyOf || []).map((one) => one.type).find((type) => type !== "null");
}

function limitsOf(facts) {
  const hasLimit = (one) => one.minimum !== undefined || one.maximum !== undefined;
  return facts.type ? facts : (facts.anyOf || []).find(hasLimit) || {};
}

function control(name, facts) {
  const common = { name, id: `field-${name}`, title: facts.description || "" };
  if (LONG.includes(name)) return make("textarea", { ...common, rows: name === "prompt" ? 3 : 2 });
  if (IMAGES.includes(name)) {
    const multiple = (facts.anyOf || []).some((one) => one.type === "array");
    return make("input", { ...common, type: "file", accept: IMAGE_TYPES.join(), multiple });
  }
  if (name === "scheduler") return samplers(common, facts);
  if (name === "model") return make("select", common, ...namesOf(facts).map((one) => make("option", {}, one)));
  const kind = kindOf(facts);
  if (kind === "integer" || kind === "number") return numberField(common, facts, kind);
  return make("input", { ...common, type: "text", autocomplete: "off" });
}

const namesOf = (facts) => (facts.enum || []).filter((one) => one !== null);

function samplers(common, facts) {
  const option = (value, textContent) => make("option", { textContent, value });
  const choices = (facts.examples || []).map((value) => option(value, value));
  return make("select", common, option("", "default"), ...choices);
}

function numberField(common, facts, kind) {
  const isSide = common.name === "width" || common.name === "height";
  const step = kind === "number" ? "any" : isSide ? 8 : 1;
  const placeholder = common.name === "seed" ? "random" : "";
  const field = make("input", { ...common, type: "number", step, placeholder });
  const limits = limitsOf(facts);
  if (limits.minimum !== undefined) field.min = limits.minimum;
  if (limits.maximum !== undefined) field.max = limits.maximum;
  // as an attribute: it is what "use again" goes back to
  if (typeof facts.default === "number") field.setAttribute("value", facts.default);
  return field;
}

function title(name) {
  const text = TITLES[name] || name.replaceAll("_", " ");
  return text[0].toUpperCase() + text.slice(1);
}

function labelled(field) {
  const hint = HINTS[field.name];
  const more = hint ? [make("span", { className: "hint", textContent: hint })] : [];
  return make("label", { htmlFor: field.id }, title(field.name), field, ...more);
}

// the chosen file with its thumbnail; files are also taken by drop and paste
function imageField(field) {
  const thumbnail = make("img", { alt: "", hidden: true });
  const clear = make("button", { type: "button", className: "quiet", hidden: true }, "Clear");
  clear.setAttribute("aria-label", `Clear ${title(field.name)}`);
  const box = make("div", { className: "image-field" }, labelled(field), thumbnail, clear);
  if (field.name === "mask_image") {
    const brush = { type: "button", id: "paint", className: "quiet", onclick: paintMask };
    box.append(make("button", brush, "Paint"));
  }
  field.addEventListener("change", () => showThumbnail(field, thumbnail, clear));
  clear.addEventListener("click", () => { setFile(field, null); field.focus(); });
  box.addEventListener("dragover", (event) => event.preventDefault());
  box.addEventListener("drop", (event) => {
    event.preventDefault();
    takeFile(field, event.dataTransfer.files[0]);
  });
  return box;
}

function showThumbnail(field, thumbnail, clear) {
  const [file, ...more] = field.files;
  if (thumbnail.src) URL.revokeObjectURL(thumbnail.src);
  if (file) thumbnail.src = URL.createObjectURL(file);
  else thumbnail.removeAttribute("src");
  const others = more.length ? ` and ${more.length} more` : "";
  thumbnail.alt = file ? `${title(field.name)}: ${file.name}${others}` : "";
  thumbnail.hidden = clear.hidden = !file;
}

// file: one, an array of them where the field takes several, or nothing
function setFile(field, file) {
  const transfer = new DataTransfer();
  for (const one of [file || []].flat()) transfer.items.add(one);
  field.files = transfer.files;
  field.dispatchEvent(new Event("change"));
}

function takeFile(field, file) {
  if (!file) return;
  const isImage = IMAGE_TYPES.includes(file.type);
  showError(isImage ? null : new Error(`${file.name} is not a PNG, JPEG or WebP image.`));
  if (isImage) setFile(field, field.multiple ? [...field.files, file] : file);
}

// those of a request: the file of "settings from an image" has no name
const imageFields = () => [...byId("form").elements].filter((one) => one.type === "file" && one.name);

// into the image field that has the focus, else into the first empty one
function paste(event) {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  const fields = imageFields();
  if (!file || !fields.length) return;
  event.preventDefault();
  const isFocused = (field) => field.closest(".image-field").contains(document.activeElement);
  takeFile(fields.find(isFocused) || fields.find((one) => !one.files.length) || fields[0], file);
}

function addFields(names, into, schema) {
  let pair = null;
  for (const name of names.filter((one) => one in schema.properties)) {
    const field = control(name, schema.properties[name]);
    field.required = (schema.required || []).includes(name);
    if (field.type === "file") {
      into.append(imageField(field));
      addFields([BESIDE[name]], into.lastChild, schema);
      pair = null;
    } else if (name === "lora") {
      into.append(loraField(field));
      pair = null;
    } else if (field.tagName === "SELECT" || field.type === "number") {
      if (pair?.childElementCount !== 1) into.append((pair = make("div", { className: "pair" })));
      pair.append(labelled(field));
    } else {
      into.append(labelled(field));
      pair = null;
    }
  }
}

// model: the one that the schema is for; empty for the host's first
function buildForm(schema, model) {
  for (const id of ["first-fields", "fields", "more-fields"]) byId(id).replaceChildren();
  if (namesOf(schema.properties.model).length < 2) delete schema.properties.model;
  addFields(FIRST, byId("first-fields"), schema);
  addFields(USUAL, byId("fields"), schema);
  addFields(MORE, byId("more-fields"), schema);
  byId("more").hidden = !byId("more-fields").childElementCount;
  const choice = byId("field-model");
  if (choice && model) choice.value = model;
  choice?.addEventListener("change", () => changeModel(choice.value));
  byId("field-prompt")?.focus();
}

// what is wrong with a field, in words for people; empty if nothing is
function faultOf(field) {
  if (field.name === "prompt" && !field.value.trim()) {
    return "The prompt is empty. Describe the image that you want.";
  }
  if (field.type === "file" && field.validity.valueMissing) {
    return `${title(field.name)} is missing. Choose a file, drop one or paste one.`;
  }
  return field.validity.valid ? "" : `${title(field.name)}: ${field.validationMessage}`;
}

function checkForm() {
  for (const field of byId("form").elements) {
    const fault = field.name ? faultOf(field) : "";
    if (!fault) continue;
    byId("more").open ||= byId("more").contains(field);
    field.focus({ preventScroll: true });
    throw new Error(fault);
  }
}

function asBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function chosenFiles() {
  const fields = imageFields();
  const chosen = fields.filter((one) => one.files.length);
  const filesOf = (one) => (one.files.length > 1 ? [...one.files] : one.files[0]);
  return Object.fromEntries(chosen.map((one) => [one.name, filesOf(one)]));
}

// everything but the images
function formSettings() {
  const values = {};
  for (const field of byId("form").elements) {
    if (!field.name || field.type === "file" || field.value === "") continue;
    if (field.type === "number") values[field.name] = Number(field.value);
    else values[field.name] = field.name === "lora" ? JSON.parse(field.value) : field.value;
  }
  if (!byId("field-init_image")?.files.length) delete values.strength;
  return values;
}

// settings as formSettings gave them, and the files of their images
function fillForm(settings, files) {
  for (const field of byId("form").elements) {
    if (!field.name) continue;
    const value = settings[field.name];
    if (field.type === "file") setFile(field, files[field.name]);
    else if (value === undefined) field.value = field.getAttribute("value") || "";
    else field.value = field.name === "lora" ? JSON.stringify(value) : value;
    if (field.name === "lora") field.dispatchEvent(new Event("change"));
    byId("more").open ||= value !== undefined && field.name === "lora";
  }
}

// names of fields as the form shows them
function inPlainWords(message) {
  const names = [...byId("form").elements].map((one) => one.name || "");
  const inWords = (text, name) => text.replaceAll(name, title(name));
  return names.filter((name) => name.includes("_")).reduce(inWords, message);
}

function showError(error) {
  const isNetwork = error instanceof TypeError;
  const text = isNetwork ? "The host does not answer. Is it still running?" : error?.message;
  byId("error").textContent = error ? inPlainWords(text) : "";
  byId("error").hidden = !error;
  if (error) byId("error").scrollIntoView({ block: "nearest" });
}

function showNote(text) {
  byId("note").textContent = text;
  byId("note").hidden = !text;
}
