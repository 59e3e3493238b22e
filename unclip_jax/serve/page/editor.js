// The editor: paint what is drawn anew, or move the frame past the edge and draw what lies beyond.
import { button, el, find, findAll, notify, openDialog, saveFile, timeLeft } from "./dom.js";
import { createEasel } from "./easel.js";
import { toBlob } from "./jobs.js";
import { Sheet } from "./sheet.js";
import { newId } from "./store.js";

const TOOLS = [
  ["brush", "Brush", "B", "Paint what is drawn anew. The rest stays as it is."],
  ["eraser", "Eraser", "E", "Take paint away."],
  ["frame", "Frame", "F", "Move the frame past the edge to draw what lies beyond."],
  ["hand", "Hand", "H", "Move the view. Zoom with the wheel or two fingers."],
];

/** `draw(job options)` starts a run and returns its Job; `onSaved(run)` hears of sheets that were kept. */
export function createEditor({ settings, draw, store, onSaved }) {
  const dialog = find("#editor"), bar = find("#toolbar"), prompt = find("#editor-prompt"), send = find("#editor-draw");
  const candidates = find("#candidates");
  const easel = createEasel(find("#sheet-holder"), refresh);
  let source = null, job = null, offered = null, saved = 0;

  // The toolbar is made once.
  const tools = TOOLS.map(([name, title, key]) => {
    const node = button(`${title} (${key})`, () => choose(name), { icon: name, quiet: true, "data-tool": name });
    return node;
  });
  const size = el("input", { type: "range", min: 1, "aria-label": "Brush size", oninput: () => { easel.radius = Number(size.value) / 2; easel.changed(); } });
  const undo = button("Undo (Ctrl+Z)", () => travel("undo"), { icon: "undo", quiet: true });
  const redo = button("Redo (Ctrl+Shift+Z)", () => travel("redo"), { icon: "redo", quiet: true });
  const clear = button("Take all paint away", () => { easel.sheet.push({ mask: new Uint8Array(easel.sheet.state.mask.length) }); easel.changed(); }, { icon: "clear", quiet: true });
  const zoomShown = el("output", { "aria-label": "Zoom" });
  bar.append(...tools, el("span", { class: "gap" }), el("label", { class: "size" }, el("span", { text: "Size" }), size),
    el("span", { class: "gap" }), undo, redo, clear, el("span", { class: "spacer" }),
    button("Zoom out (−)", () => easel.zoomBy(0.8), { icon: "minus", quiet: true }), zoomShown,
    button("Zoom in (+)", () => easel.zoomBy(1.25), { icon: "plus", quiet: true }),
    button("Show all (0)", () => easel.fit(), { icon: "fit", quiet: true }));
  find("#editor-actions").append(
    button("Keep in the history", keep, { icon: "check", class: "small" }),
    button("Download", download, { icon: "download", class: "small" }));

  function refresh() {
    const { sheet } = easel;
    if (!sheet) return;
    easel.canvas.dataset.tool = easel.locked ? "hand" : easel.tool;
    for (const node of tools) node.setAttribute("aria-pressed", String(node.dataset.tool === easel.tool));
    size.value = Math.round(easel.radius * 2);
    undo.disabled = !sheet.canUndo || easel.locked;
    redo.disabled = !sheet.canRedo || easel.locked;
    clear.disabled = easel.locked || !sheet.state.mask.includes(1);
    for (const node of [...tools, size]) node.disabled = easel.locked;
    zoomShown.textContent = `${Math.round(easel.zoom() * 100)} %`;
    send.disabled = easel.locked;
    easel.hint.textContent = offered ? "Choose a picture below, or discard them all."
      : easel.locked ? "The pictures are being drawn." : TOOLS.find(([name]) => name === easel.tool)[3];
  }

  function choose(tool) {
    easel.tool = tool;
    easel.changed();
  }

  function travel(way) {
    easel.sheet[way]();
    easel.changed();
  }

  function resize(factor) {
    easel.radius = Math.min(size.max / 2, Math.max(0.5, factor > 1 ? Math.max(easel.radius * factor, easel.radius + 0.5) : easel.radius * factor));
    easel.changed();
  }

  /** Opens the editor on a picture: {blob, title, settings}. */
  async function open(picture) {
    source = picture;
    offered = null;
    easel.locked = false;
    easel.candidate = null;
    candidates.hidden = true;
    easel.sheet = new Sheet(await createImageBitmap(picture.blob), settings.size);
    saved = 0;
    size.max = Math.round(settings.size / 2);
    easel.radius = Math.max(1, settings.size / 12);
    easel.tool = "brush";
    prompt.value = picture.settings.prompt ?? "";
    openDialog(dialog);
    easel.fit();
    easel.canvas.focus();
  }

  async function start(event) {
    event?.preventDefault();
    if (easel.locked) return;
    if (!prompt.value.trim()) {
      prompt.focus();
      return notify("Describe the whole picture first, with what is to be new in it.", { kind: "error" });
    }
    const unknown = easel.sheet.unknown();
    if (!unknown.includes(1)) {
      return notify("Nothing is to be drawn yet. Paint a part of the picture, or move the frame past its edge.", { kind: "error" });
    }
    const { n, seed, ...shared } = settings.values();
    const count = Number(find("#editor-count").value);
    const fields = { ...shared, prompt: prompt.value.trim(), n: count, seed };
    easel.locked = true;
    refresh();
    const files = await easel.sheet.request();
    job = draw({ kind: "edit", title: fields.prompt, path: "v1/images/edits", fields, files, count, partials: settings.partials, quiet: true, settings: settings.complete(fields) });
    const mine = job;
    showProgress(job);
    try {
      const result = await job.done;
      if (mine !== job) return;
      if (!result) return release();
      await offer(result);
    } catch (error) {
      if (mine === job) {
        release();
        notify(error.message, { kind: "error", action: { name: "Try again", run: start } });
      }
    }
  }

  function showProgress(current) {
    const meter = el("progress", { max: 1, "aria-label": "Progress" }), left = el("span", { class: "left" });
    current.addEventListener("change", () => {
      if (current.fraction === null) meter.removeAttribute("value");
      else meter.value = current.fraction;
      left.textContent = timeLeft(current);
      const first = current.pictures.find(Boolean);
      if (first && current === job) createImageBitmap(first).then((bitmap) => { if (easel.locked && !offered && current === job) { easel.candidate = bitmap; easel.changed(); } });
    });
    candidates.replaceChildren(el("div", { class: "progress" }, meter, left, button("Stop", () => current.cancel(), { class: "small" })));
    candidates.hidden = false;
  }

  async function offer({ run, blobs }) {
    const bitmaps = await Promise.all(blobs.map((blob) => createImageBitmap(blob)));
    const urls = blobs.map((blob) => URL.createObjectURL(blob));
    offered = { run, bitmaps, urls, at: 0 };
    const nodes = urls.map((url, index) => el("button", { type: "button", class: "tile", "aria-label": `Candidate ${index + 1}`, onclick: () => show(index) }, el("img", { src: url, alt: "" })));
    candidates.replaceChildren(...nodes, el("span", { class: "spacer" }),
      button("Discard", release), button("Use this one", accept, { class: "primary" }));
    candidates.hidden = false;
    show(0);
    nodes[0].focus();
  }

  function show(index) {
    offered.at = (index + offered.bitmaps.length) % offered.bitmaps.length;
    easel.candidate = offered.bitmaps[offered.at];
    findAll(".tile", candidates).forEach((node, i) => node.setAttribute("aria-pressed", String(i === offered.at)));
    easel.changed();
  }

  function accept() {
    easel.sheet.accept(offered.bitmaps[offered.at], { ...offered.run.settings, picture: offered.at });
    release();
  }

  /** Back to painting, with what was drawn taken away. */
  function release() {
    offered?.urls.forEach((url) => URL.revokeObjectURL(url));
    offered = null;
    job = null;
    easel.locked = false;
    easel.candidate = null;
    candidates.hidden = true;
    candidates.replaceChildren();
    easel.changed();
    easel.canvas.focus({ preventScroll: true });
  }

  /** The settings of the first picture, and of every one that was put into the frame since. */
  function sheetSettings() {
    const { width, height, edits } = easel.sheet.state;
    const { model } = source.settings;
    return { kind: "sheet", model, prompt: prompt.value.trim(), size: `${width}x${height}`, from: source.settings, edits };
  }

  async function keep() {
    const { sheet } = easel;
    const run = { id: newId(), kind: "sheet", title: prompt.value.trim() || source.title, created: new Date().toISOString(), settings: sheetSettings(), pictures: [newId()] };
    const blob = toBlob(new Uint8Array(await (await sheet.blob()).arrayBuffer()), { ...run.settings, created: run.created });
    await store.save(run, { [run.pictures[0]]: blob });
    saved = sheet.at;
    onSaved(run);
    notify("Kept in the history.");
  }

  async function download() {
    const bytes = new Uint8Array(await (await easel.sheet.blob()).arrayBuffer());
    saveFile(toBlob(bytes, sheetSettings()), "unclip-edit.png");
  }

  /** Closes the editor; a sheet that was drawn on and not kept yet is kept. */
  async function close() {
    job?.cancel();
    const { sheet } = easel;
    const drawn = sheet.state.canvas !== sheet.states[0].canvas;
    if (drawn && sheet.at !== saved) await keep();
    dialog.close();
  }

  find("#editor-form").addEventListener("submit", start);
  find("[data-close]", dialog).addEventListener("click", close);
  dialog.addEventListener("cancel", (event) => {
    event.preventDefault();
    if (offered) release();
    else close();
  });
  dialog.addEventListener("close", () => { release(); easel.sheet = null; });
  // On the document: if the control that had the focus is gone, keys arrive at the body.
  document.addEventListener("keydown", (event) => {
    if (!dialog.open) return;
    const letter = event.key.toLowerCase(), typing = event.target.closest("input:not([type=range]), textarea");
    if ((event.ctrlKey || event.metaKey) && !typing && !easel.locked) {
      if (letter === "z") travel(event.shiftKey ? "redo" : "undo");
      else if (letter === "y") travel("redo");
      else if (event.key === "Enter") start();
      else return;
      return event.preventDefault();
    }
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (offered && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
      show(offered.at + (event.key === "ArrowLeft" ? -1 : 1));
      findAll(".tile", candidates)[offered.at].focus();
      return event.preventDefault();
    }
    const tool = TOOLS.find(([, , key]) => key.toLowerCase() === letter);
    if (tool && !easel.locked) choose(tool[0]);
    else if (letter === "[") resize(0.8);
    else if (letter === "]") resize(1.25);
    else if (letter === "+" || letter === "=") easel.zoomBy(1.25);
    else if (letter === "-") easel.zoomBy(0.8);
    else if (letter === "0") easel.fit();
    else return;
    event.preventDefault();
  }, true);

  return { open, easel };
}
