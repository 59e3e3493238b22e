// The unmodified Node client against a running server: node client.mjs ADDRESS PICTURE MASK. Prints what it got as JSON.
import { createReadStream } from "node:fs";
import OpenAI, { toFile } from "openai";

const [address, picture, mask] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "any", maxRetries: 0, timeout: 600_000 });
const open = (path) => toFile(createReadStream(path), "picture.png", { type: "image/png" });
const found = {};

const generated = await client.images.generate({ prompt: "a red fox", n: 2, response_format: "b64_json", seed: 7 });
found.generated = generated.data.map((one) => one.b64_json);
found.seed = generated.seed;

const byUrl = await client.images.generate({ prompt: "a red fox", response_format: "url", seed: 7 });
const answer = await fetch(byUrl.data[0].url);
found.url = Buffer.from(await answer.arrayBuffer()).toString("base64");

const edited = await client.images.edit({
  image: await open(picture), mask: await open(mask), prompt: "a fox", response_format: "b64_json",
});
found.edited = edited.data.map((one) => one.b64_json);

const several = await client.images.edit({
  image: [await open(mask), await open(mask)], prompt: "a fox", response_format: "b64_json",
});
found.several = several.data.map((one) => one.b64_json);

const varied = await client.images.createVariation({ image: await open(picture), n: 2, response_format: "b64_json" });
found.varied = varied.data.map((one) => one.b64_json);

found.events = [];
for await (const event of await client.images.generate({ prompt: "a fox", stream: true, partial_images: 2 })) {
  found.events.push(event.type);
}

try {
  await client.images.generate({ prompt: "a fox", n: 11 });
} catch (error) {
  found.error = { name: error.constructor.name, status: error.status, param: error.param, request: error.requestID };
}
found.models = (await client.models.list()).data.map((model) => model.id);
console.log(JSON.stringify(found));
