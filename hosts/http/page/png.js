// Settings from an image that this host or A1111's web interface made.
"use strict";

const PNG_FIELDS = {
  Prompt: "prompt", "Negative prompt": "negative_prompt", Steps: "num_inference_steps",
  "CFG scale": "guidance_scale", Seed: "seed", "Size-1": "width", "Size-2": "height",
  "Denoising strength": "strength",
  "Guidance scale": "guidance_scale", // of a model that counts it otherwise than CFG
};

async function settingsFromImage(file) {
  const image = await asBase64(file);
  const headers = { "Content-Type": "application/json" };
  const facts = { method: "POST", headers, body: JSON.stringify({ image }) };
  const { info, parameters } = await api("sdapi/v1/png-info", facts);
  const found = info.startsWith("{") ? JSON.parse(info) : inOurNames(parameters);
  const known = Object.entries(found).filter(([name, value]) => byId(`field-${name}`) && value !== null);
  if (!known.length) throw new Error(`${file.name} holds no settings.`);
  fillForm(Object.fromEntries(known.map(([name, value]) => [name, plainValue(value)])), {});
  showNote(`Settings of ${file.name}. Its images and LoRAs must be chosen again.`);
}

const inOurNames = (parameters) =>
  Object.fromEntries(
    Object.entries(PNG_FIELDS)
      .filter(([theirs]) => theirs in parameters)
      .map(([theirs, ours]) => [ours, parameters[theirs]]),
  );

// a sampler with settings is shown by its name
const plainValue = (value) => (value?.constructor === Object ? value.scheduler ?? "" : value);

async function takeSettings(picker) {
  const [file] = picker.files;
  picker.value = "";
  showError(null);
  showNote("");
  try {
    if (file) await settingsFromImage(file);
  } catch (error) {
    showError(error);
  }
}
