// What OpenAI's package for Node gets from a host: node published.mjs BASE_URL IMAGE.png
import fs from "node:fs";
import OpenAI, { toFile } from "openai";

const [base, path] = process.argv.slice(2);
const client = new OpenAI({ baseURL: base, apiKey: "anything", maxRetries: 0 });
const fields = { prompt: "a red car", size: "64x64", seed: 5, steps: 3, guidance: 5 };
const found = {};

found.models = [];
for await (const model of client.models.list()) found.models.push(model.id);

const drawn = await client.images.generate({ ...fields, n: 2, response_format: "b64_json" });
found.images = drawn.data.map((image) => image.b64_json);

const linked = await client.images.generate({ ...fields, response_format: "url" });
const answer = await fetch(linked.data[0].url);
found.linked = Buffer.from(await answer.arrayBuffer()).toString("base64");

found.events = [];
const partly = { ...fields, steps: 6, stream: true, partial_images: 2 };
const stream = await client.images.generate(partly);
for await (const event of stream) found.events.push([event.type, event.b64_json]);

const image = await toFile(fs.createReadStream(path), "a.png", { type: "image/png" });
const edited = await client.images.edit({
  ...fields, image, strength: 0.5, response_format: "b64_json",
});
found.edited = edited.data[0].b64_json;

try {
  await client.images.generate({ ...fields, seeed: 1 });
} catch (error) {
  found.error = [error.constructor.name, error.status, error.param, error.message];
}
console.log(JSON.stringify(found));
