// Puts the parts of the page together.
import { apiKey, health, models } from "./api.js";
import { button, el, find, findAll, isTyping, notify, openDialog } from "./dom.js";
import { createEditor } from "./editor.js";
import { createAddresses, createGallery } from "./gallery.js";
import { importPicture, watchDrops } from "./intake.js";
import { Job } from "./jobs.js";
import { createSettings } from "./settings.js";
import { openStore } from "./store.js";
import { createVerbs } from "./verbs.js";
import { createViewer } from "./viewer.js";

const KEYS = [
  ["Everywhere", [["?", "This help"], ["/", "Write the prompt"], ["Ctrl Enter", "Draw"], ["s", "Settings"], ["o", "Open a picture"], ["Esc", "Close"]]],
  ["A picture", [["← →", "Previous, next picture"], ["v", "Variations"], ["e", "Edit"], ["i", "Interpolate"], ["t", "Text diff"], ["d", "Download"]]],
  ["The editor", [["b", "Brush"], ["e", "Eraser"], ["f", "Frame: arrows move it"], ["h", "Hand: arrows move the view"], ["[ ]", "Smaller, larger brush"],
    ["← → ↑ ↓", "Move the brush; with Shift by one pixel"], ["Space", "Paint under the brush; held with the mouse: hand"], ["Ctrl Z", "Undo"], ["Ctrl Shift Z", "Redo"], ["+ − 0", "Zoom in, out, show all"], ["Ctrl Enter", "Draw"]]],
];
const EXAMPLES = {
  emoji: ["a 3d emoji of a red heart", "a flat emoji of the sun", "a noto emoji of a rainbow", "a flat emoji of a green apple"],
  other: ["a corgi playing a flame throwing trumpet", "a teddy bear on a skateboard in Times Square", "a still life of fruit in oil paint"],
};

const store = await openStore();
const addresses = createAddresses(store);
const settings = createSettings();
const banner = find("#banner");

const draw = (options) => gallery.follow(new Job(options, store));

const gallery = createGallery({
  store, addresses,
  onOpen: (run, index) => viewer.open(run, index),
  onUse: useSettings,
  onRetry: (job) => draw(job.options),
  onKey: () => openConnection(),
});
const verbs = createVerbs({
  settings, draw, store, addresses,
  recent: () => gallery.runs.flatMap((run) => run.pictures.map((_, index) => ({ run, index }))),
});
const editor = createEditor({ settings, draw, store, onSaved: gallery.add });
const viewer = createViewer({ store, addresses, settings, verbs, onEdit: editor.open, onUse: useSettings, onDelete: gallery.remove });

function useSettings(chosen) {
  settings.use(chosen);
  scrollTo({ top: 0 });
  find("#prompt").focus();
}

function submit() {
  const problem = settings.problem();
  if (problem) {
    const [field, message] = problem;
    if (field === "seed" && find("#settings").hidden) find("#toggle-settings").click();
    find(`#${field}`).focus();
    return notify(message, { kind: "error" });
  }
  const fields = settings.values();
  draw({
    kind: "generation", title: fields.prompt, path: "v1/images/generations", fields, count: fields.n,
    partials: settings.partials, settings: settings.complete(fields),
  });
}

async function openFile(file) {
  if (!file) return;
  try {
    const run = await importPicture(file, store);
    gallery.add(run);
    if (find("#editor").open) return;
    viewer.open(run, 0);
  } catch (error) {
    notify(error.message, { kind: "error" });
  }
}

function fillHelp() {
  find("#help-body").replaceChildren(
    el("p", { text: "Write what you want to see and press Draw. Press a picture to see it large, to vary it, to edit it, or to turn it into another. Everything stays in this browser." }),
    ...KEYS.flatMap(([title, keys]) => [
      el("h3", { text: title }),
      el("dl", { class: "keys" }, keys.map(([key, text]) => [el("dt", {}, key.split(" ").map((one) => el("kbd", { text: one }))), el("dd", { text })])),
    ]),
    el("div", { class: "actions end" }, button("Delete the whole history", clearHistory, { icon: "trash" })));
}

async function clearHistory() {
  if (!confirm("Delete all pictures of the history? This cannot be undone.")) return;
  await store.clear();
  await gallery.load();
  find("#help").close();
}

/** Waits until the server can draw, and says so in the meantime. Its bundles can be asked for before that. */
async function waitForServer() {
  for (let loaded = false; ; ) {
    const { ready, reachable } = await health();
    if ((ready || reachable) && !loaded) {
      loaded = true;
      await loadModels();
    }
    if (ready) break;
    banner.hidden = false;
    banner.classList.add("busy");
    banner.textContent = reachable ? "The server prepares its programs. It draws as soon as it is ready." : "The server does not answer. Check that `unclip serve` runs.";
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  banner.hidden = true;
}

async function loadModels() {
  try {
    const found = await models();
    settings.setModels(found);
    find("#model").closest("label").hidden = !found.length;
    const examples = EXAMPLES[found.some(({ id }) => id.includes("emoji")) ? "emoji" : "other"];
    find("#examples").replaceChildren(...examples.map((text) => button(text, () => {
      find("#prompt").value = text;
      find("#prompt").dispatchEvent(new Event("input"));
      submit();
    })));
  } catch (error) {
    if (error.status === 401) openConnection(error.message);
    else notify(error.message, { kind: "error", action: { name: "Try again", run: loadModels } });
  }
}

function openConnection(message = "") {
  find("#key").value = apiKey.get();
  find("#connection-about").textContent = message || `Server: ${new URL(".", document.baseURI).href}`;
  openDialog(find("#connection"));
}

function showTheme() {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
  const name = dark ? "Light colours" : "Dark colours";
  const node = find("#switch-theme");
  node.setAttribute("aria-pressed", String(dark));
  node.setAttribute("aria-label", "Dark colours");
  node.title = name;
  find("use", node).setAttribute("href", dark ? "#icon-sun" : "#icon-moon");
}

find("#switch-theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("unclip-theme", document.documentElement.dataset.theme);
  } catch {
    // The choice lasts until the page closes.
  }
  showTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
find("#composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
find("#prompt").addEventListener("keydown", (event) => {
  // Enter draws, as in a chat; Shift and Enter begins a line.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
find("#open-picture").addEventListener("click", () => find("#file").click());
find("#file").addEventListener("change", () => { openFile(find("#file").files[0]); find("#file").value = ""; });
find("#open-help").addEventListener("click", () => openDialog(find("#help")));
find("#open-connection").addEventListener("click", () => openConnection());
find("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set(find("#key").value.trim());
  find("#connection").close();
  loadModels();
});
for (const dialog of findAll(".small-dialog")) {
  find("[data-close]", dialog).addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}
addEventListener("keydown", (event) => {
  if (isTyping(event.target) || event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (event.key === "?" && !find("#help").open) {
    event.preventDefault();
    return openDialog(find("#help"));
  }
  if (find("dialog[open]")) return;
  const keys = { "/": () => find("#prompt").focus(), s: () => find("#toggle-settings").click(), o: () => find("#open-picture").click() };
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
watchDrops(find("#drop"), openFile);
fillHelp();
showTheme();
if (!store.kept) notify("This browser keeps nothing for this page. The history lasts until you close it.", { seconds: 15 });
await gallery.load();
if (matchMedia("(pointer: fine)").matches) find("#prompt").focus();
await waitForServer();
