// Pictures from outside: opened, dropped or pasted files become runs of the history.
import { newId } from "./store.js";
import { readSettings, isPng } from "./png.js";
import { canvasBlob, makeCanvas } from "./sheet.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/avif"];
const MAX_SIDE = 1024, MAX_BYTES = 3 * 2 ** 20;

/** Reads a file as a PNG of at most MAX_SIDE pixels a side. Throws an Error with a message in words. */
export async function readPicture(file) {
  const name = file.name || "The file";
  if (!TYPES.includes(file.type)) throw new Error(`${name} is no picture that can be read. Use PNG, JPEG or WebP.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${name} is damaged or no picture.`);
  }
  const bytes = new Uint8Array(await file.arrayBuffer());
  const settings = readSettings(bytes);
  const shrink = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (shrink === 1 && isPng(bytes) && bytes.length <= MAX_BYTES) {
    return { blob: new Blob([bytes], { type: "image/png" }), settings };
  }
  const canvas = makeCanvas(Math.max(1, Math.round(bitmap.width * shrink)), Math.max(1, Math.round(bitmap.height * shrink)));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return { blob: await canvasBlob(canvas), settings };
}

/** Settings out of a file as the page names them. The server itself writes the decoder's below `options`. */
function named(settings) {
  if (!settings) return {};
  const { steps, guidance_scale } = settings.options?.decoder ?? {};
  return { ...(steps ? { steps } : {}), ...(guidance_scale ? { guidance_scale } : {}), ...settings };
}

/** Makes a picture a run of the history, and returns the run. */
export async function importPicture(file, store) {
  const { blob, settings: found } = await readPicture(file);
  const settings = named(found);
  const title = String(settings.prompt || (file.name || "Pasted picture").replace(/\.[^.]+$/, ""));
  const run = {
    id: newId(), kind: "import", title, created: new Date().toISOString(),
    settings: { ...settings, file: file.name || "pasted" }, pictures: [newId()],
  };
  await store.save(run, { [run.pictures[0]]: blob });
  return run;
}

const files = (transfer) => [...(transfer?.files ?? [])];
const hasFiles = (transfer) => [...(transfer?.types ?? [])].includes("Files");

/** Calls `onFile(file)` for pictures dropped anywhere or pasted; `overlay` shows where they may fall. */
export function watchDrops(overlay, onFile) {
  let depth = 0;
  const show = (on) => { overlay.hidden = !on; };
  addEventListener("dragenter", (event) => {
    if (!hasFiles(event.dataTransfer)) return;
    depth += 1;
    show(true);
  });
  addEventListener("dragleave", () => {
    depth = Math.max(0, depth - 1);
    if (!depth) show(false);
  });
  addEventListener("dragover", (event) => { if (hasFiles(event.dataTransfer)) event.preventDefault(); });
  addEventListener("drop", (event) => {
    depth = 0;
    show(false);
    if (event.defaultPrevented || !files(event.dataTransfer).length) return;
    event.preventDefault();
    onFile(files(event.dataTransfer)[0]);
  });
  addEventListener("paste", (event) => {
    const [file] = files(event.clipboardData).filter((one) => one.type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    onFile(file);
  });
}

/** Lets a node take a dropped file of its own. */
export function takesDrops(node, onFile) {
  node.addEventListener("dragover", (event) => {
    if (!hasFiles(event.dataTransfer)) return;
    event.preventDefault();
    node.classList.add("over");
  });
  node.addEventListener("dragleave", () => node.classList.remove("over"));
  node.addEventListener("drop", (event) => {
    node.classList.remove("over");
    const [file] = files(event.dataTransfer);
    if (!file) return;
    event.preventDefault();
    onFile(file);
  });
  return node;
}
