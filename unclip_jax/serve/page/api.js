// The server's API: requests, streamed pictures, and errors in words.

const KEY = "unclip-key";
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => sessionStorage.setItem(KEY, key),
};

/** What went wrong, in words. `status` is 0 if there was no answer; `retryAfter` is in seconds. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter, requestId });
  }
}

function inWords(status, error, headers) {
  const said = error?.message ?? "";
  const retryAfter = Number(headers.get("retry-after")) || null;
  const when = retryAfter ? `in ${retryAfter} s` : "in a moment";
  const messages = {
    401: "The server asks for a key. Enter it under Connection.",
    404: said || "The server does not know this address.",
    413: `The picture is too large for the server. ${said}`,
    429: `The server is busy. Try again ${when}.`,
    503: `The server is not ready. Try again ${when}.`,
  };
  const fallback = status >= 500 ? "The server failed. Its log says why." : `The server answered ${status}.`;
  const message = messages[status] ?? (said || fallback);
  const requestId = headers.get("x-request-id");
  return new ApiError(message.trim(), { status, param: error?.param ?? null, retryAfter, requestId });
}

/** Asks the server. `body` is an object (sent as JSON) or a FormData. Paths are relative to the page. */
async function ask(path, { body = null, signal = null } = {}) {
  const headers = {};
  if (apiKey.get()) headers.authorization = `Bearer ${apiKey.get()}`;
  const options = { method: body ? "POST" : "GET", headers, signal };
  if (body instanceof FormData) options.body = body;
  else if (body) {
    headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Check that `unclip serve` runs, then try again.");
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    throw inWords(response.status, answer?.error, response.headers);
  }
  return response;
}

/** {ready, message}: whether the server's programs are compiled. */
export async function health(signal) {
  try {
    await ask("healthz", { signal });
    return { ready: true, reachable: true };
  } catch (error) {
    return { ready: false, reachable: error.status === 503 };
  }
}

/** The bundles that the server has: {id, sizes: [pixels], priors, verbs, defaults: {steps, guidance_scale}}. */
export async function models() {
  const { data } = await (await ask("v1/models")).json();
  return data.map(({ id, sizes = [], priors = [], verbs = [], defaults = {} }) => {
    // The decoder's, or those of the first part that has any.
    const { steps, guidance_scale } = defaults.decoder ?? Object.values(defaults)[0] ?? {};
    return { id, sizes: sizes.map((size) => parseInt(size, 10)), priors, verbs, defaults: { steps, guidance_scale } };
  });
}

/** The blocks of a stream of server-sent events, as {event, data}. */
export async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  const parse = (block) => {
    const fields = { event: "message", data: [] };
    for (const line of block.split(/\r\n|\r|\n/)) {
      const at = line.indexOf(":");
      const [name, value] = at < 0 ? [line, ""] : [line.slice(0, at), line.slice(at + 1).replace(/^ /, "")];
      if (name === "data") fields.data.push(value);
      else if (name === "event") fields.event = value;
    }
    return { event: fields.event, data: fields.data.join("\n") };
  };
  for (;;) {
    const { done, value } = await reader.read();
    text += value ?? "";
    const blocks = text.split(/\r\n\r\n|\n\n|\r\r/);
    text = done ? "" : blocks.pop();
    for (const block of blocks) {
      const event = parse(block);
      if (event.data) yield event;
    }
    if (done) return;
  }
}

/** A picture's bytes out of base64. */
const decode = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

/**
 * Draws. `fields` go as JSON, or as a form if there are `files`, {name: blob or [blob]}. `onPartial(index, bytes,
 * step)` gets each picture as it clears up. Returns {pictures: [bytes], seed, size, requestId}.
 */
export async function draw(path, fields, { files = null, partials = 0, onPartial = null, signal = null } = {}) {
  const asked = { ...fields, response_format: "b64_json" };
  if (partials) Object.assign(asked, { stream: true, partial_images: partials });
  let body = asked;
  if (files) {
    body = new FormData();
    for (const [name, value] of Object.entries(asked)) body.append(name, String(value));
    for (const [name, blobs] of Object.entries(files)) {
      for (const blob of [blobs].flat()) body.append(name, blob, `${name.replace("[]", "")}.png`);
    }
  }
  const response = await ask(path, { body, signal });
  const requestId = response.headers.get("x-request-id");
  if (!response.headers.get("content-type")?.includes("event-stream")) {
    const answer = await response.json();
    const pictures = answer.data.map((picture) => decode(picture.b64_json));
    return { pictures, seed: answer.seed ?? answer.data[0]?.seed ?? null, size: answer.size ?? null, requestId };
  }
  const pictures = [];
  let seed = null, size = null;
  for await (const { event, data } of serverEvents(response.body)) {
    if (data === "[DONE]") break;
    const said = JSON.parse(data);
    const type = said.type ?? event;
    if (type === "error" || said.error) throw inWords(said.error?.status ?? 500, said.error, new Headers());
    const index = said.index ?? said.image_index ?? null;
    seed ??= said.seed ?? null;
    size ??= said.size ?? null;
    if (type.endsWith(".partial_image")) onPartial?.(index ?? 0, decode(said.b64_json), said.partial_image_index);
    else if (type.endsWith(".completed")) pictures[index ?? pictures.length] = decode(said.b64_json);
  }
  if (!pictures.length) throw new ApiError("The server ended the answer before a picture was drawn.");
  return { pictures, seed, size, requestId };
}
