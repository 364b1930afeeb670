// The picker for LoRAs: a line with a weight for each. The form's own field, hidden, holds them as
// the host reads them.
"use strict";

function loraField(field) {
  const lines = make("ul", { className: "loras" });
  const choice = make("select", { id: "add-lora" }, make("option", { value: "" }, "Add one"));
  const read = () => JSON.parse(field.value || "{}");
  const write = (loras) => {
    field.value = Object.keys(loras).length ? JSON.stringify(loras) : "";
    field.dispatchEvent(new Event("change"));
  };
  choice.addEventListener("change", () => {
    write({ ...read(), [choice.value]: 1 });
    choice.value = "";
  });
  field.type = "hidden";
  field.addEventListener("change", () => {
    if (lines.contains(document.activeElement) && countOf(lines) === Object.keys(read()).length) return;
    lines.replaceChildren(...Object.entries(read()).map((entry) => loraLine(entry, read, write)));
  });
  listLoras(choice);
  return make("div", {}, make("label", { htmlFor: choice.id }, "LoRA", choice), lines, field);
}

const countOf = (lines) => lines.childElementCount;

function loraLine([file, weight], read, write) {
  const name = file.replace(/\.[^.]*$/, "");
  const number = { type: "number", step: "any", min: -10, max: 10, value: weight };
  const field = make("input", { ...number, title: `Weight of ${name}` });
  field.setAttribute("aria-label", `Weight of ${name}`);
  field.addEventListener("input", () => {
    if (field.value !== "") write({ ...read(), [file]: Number(field.value) });
  });
  const remove = make("button", { type: "button", className: "quiet" }, "Remove");
  remove.setAttribute("aria-label", `Remove ${name}`);
  remove.addEventListener("click", () => {
    const { [file]: _, ...others } = read();
    write(others);
    byId("add-lora").focus();
  });
  return make("li", {}, make("span", { title: file }, name), field, remove);
}

async function listLoras(choice) {
  try {
    const loras = await api("sdapi/v1/loras");
    choice.append(...loras.map(({ name, path }) => make("option", { value: path }, name)));
    choice.disabled = !loras.length;
    if (!loras.length) choice.firstChild.textContent = "There are none in the host's folder";
  } catch (error) {
    showError(error);
  }
}
