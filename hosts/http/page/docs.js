// The schema for people: every call and every field of openapi.json. No library, no build step.
"use strict";

const byId = (id) => document.getElementById(id);
const REF = "#/components/schemas/";

function make(tag, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
}

async function read() {
  const key = sessionStorage.getItem("key");
  const send = (given) => fetch("openapi.json", given ? { headers: { Authorization: `Bearer ${given}` } } : {});
  let answer = await send(key);
  if (answer.status === 401) {
    const given = window.prompt("This host requires its API key (--api_key):") || "";
    sessionStorage.setItem("key", given);
    answer = await send(given);
  }
  if (!answer.ok) throw new Error((await answer.json()).message || `the host answered ${answer.status}`);
  return answer.json();
}

function reference(schema) {
  const name = schema.$ref.slice(REF.length);
  return make("a", { href: `#${name}`, textContent: name });
}

// what a field may hold, in words
function kind(schema) {
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.anyOf) return schema.anyOf.map(kind).filter((text) => text !== "null").join(" or ");
  if (schema.type === "array") return `list of ${kind(schema.items || {})}`;
  const type = Array.isArray(schema.type) ? schema.type.filter((one) => one !== "null").join(" or ") : schema.type || "anything";
  const low = schema.minimum === undefined ? "" : ` from ${schema.minimum}`;
  const high = schema.maximum === undefined ? "" : ` to ${schema.maximum}`;
  return `${type}${schema.contentEncoding ? `, ${schema.contentEncoding}` : ""}${low}${high}`;
}

function content(name, body) {
  const line = make("li", {}, `${name}: `);
  Object.entries(body).forEach(([type, { schema }], index) => {
    line.append(index ? ", " : "", make("code", { textContent: type }));
    if (schema.$ref) line.append(" ", reference(schema));
  });
  return line;
}

function call(path, method, operation, document) {
  const lines = (operation.parameters || []).map((one) => make("li", {}, `${one.in} `, make("code", { textContent: one.name }), ` ${one.description || ""}`));
  if (operation.requestBody) lines.push(content("body", operation.requestBody.content));
  for (const [status, answer] of Object.entries(operation.responses)) {
    const line = content(`${status === "default" ? "otherwise" : status}, ${answer.description.replace(/\.$/, "")}`, answer.content || {});
    lines.push(line);
  }
  if (operation.requestBody) lines.push(make("li", {}, make("pre", { textContent: example(path, operation, document) })));
  const head = make("summary", {}, make("code", { textContent: `${method.toUpperCase()} ${path}` }), ` ${operation.summary}`);
  return make("details", { id: `${method}${path}` }, head, make("ul", {}, ...lines));
}

function example(path, operation, document) {
  const schema = operation.requestBody.content["application/json"].schema;
  const fields = schema.$ref ? document.components.schemas.Request : schema;
  const usual = { prompt: "a red circle on a blue background", seed: 1 };
  const body = Object.fromEntries(Object.entries(usual).filter(([name]) => name in fields.properties));
  for (const name of fields.required || []) body[name] = "<base64>";
  return `curl -s ${new URL(path.slice(1), location.href)} -H 'Content-Type: application/json' -d '${JSON.stringify(body)}'`;
}

function table(name, schema) {
  const rows = Object.entries(schema.properties || {}).map(([field, facts]) => {
    const isNeeded = (schema.required || []).includes(field) && name === "Request";
    const usual = facts.default === undefined || facts.default === null ? "" : JSON.stringify(facts.default);
    const examples = facts.examples ? ` One of: ${facts.examples.join(", ")}.` : "";
    const cells = [make("code", { textContent: field }), kind(facts), isNeeded ? "required" : usual, `${facts.description || ""}${examples}`];
    return make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
  });
  const head = make("tr", {}, ...["field", "type", "default", "meaning"].map((text) => make("th", { textContent: text })));
  const body = rows.length ? make("div", { className: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))) : "any object";
  return make("article", { id: name }, make("h3", { textContent: name }), body);
}

async function start() {
  const document = await read();
  byId("title").textContent = `API of this host: ${document.info.title}`;
  for (const [path, methods] of Object.entries(document.paths)) {
    for (const [method, operation] of Object.entries(methods)) byId("calls").append(call(path, method, operation, document));
  }
  byId("schemas").append(...Object.entries(document.components.schemas).map(([name, schema]) => table(name, schema)));
  if (location.hash) window.document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

start().catch((error) => {
  byId("error").textContent = error.message;
  byId("error").hidden = false;
});
