// The form at the top: what to draw and how. It remembers itself between visits.
import { el, find } from "./dom.js";

const KEPT = "unclip-form";
const MAX_SEED = 2 ** 32;
export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

const PRIORS = {
  prior_diffusion: ["Diffusion", "The prior of the paper: it draws the image embedding by diffusion."],
  prior_ar: ["Autoregressive", "Draws the image embedding code by code."],
  none: ["None", "The text embedding stands in for the image embedding."],
  null: ["Text only", "The decoder sees the text and no embedding."],
};
// Settings may come from a file, so that nothing is taken for granted of their types.
const nameOf = (prior) => (Object.hasOwn(PRIORS, prior) ? PRIORS[prior][0] : String(prior));

const NAMES = {
  kind: "Made by", model: "Bundle", prompt: "Prompt", source: "From", target: "To", seed: "Seed",
  guidance_scale: "Guidance", steps: "Steps", prior: "Prior", eta: "Change (eta)", noise: "Noise",
  max_theta: "Largest theta", theta: "Theta", size: "Size", file: "File",
};
const KINDS = {
  generation: "Prompt", variation: "Variations", edit: "Edit", interpolate: "Interpolation", text_diff: "Text diff",
  import: "Opened file", sheet: "Edited sheet",
};
export const kindName = (kind) => (Object.hasOwn(KINDS, kind) ? KINDS[kind] : KINDS.import);

/** The settings of a picture as [name, value] in words, in a fixed order. */
export function described(settings) {
  const shown = { kind: kindName, prior: nameOf, theta: (value) => Number(value).toFixed(2) };
  return Object.entries(NAMES)
    .filter(([field]) => settings[field] !== undefined && settings[field] !== null && settings[field] !== "")
    .map(([field, name]) => [name, String(shown[field] ? shown[field](settings[field]) : settings[field])]);
}

/** The settings in one line, for the feed. */
export function summary(settings) {
  const said = [];
  if (settings.seed !== undefined && settings.seed !== null) said.push(`seed ${settings.seed}`);
  if (settings.guidance_scale) said.push(`guidance ${settings.guidance_scale}`);
  if (settings.steps) said.push(`${settings.steps} steps`);
  if (settings.prior) said.push(`prior: ${nameOf(settings.prior).toLowerCase()}`);
  if (settings.eta !== undefined) said.push(`eta ${settings.eta}`);
  return said.join(" · ");
}

export function createSettings() {
  const field = (name) => find(`#${name}`);
  const state = { models: [], model: null, n: 4, touched: {} };

  const defaults = () => state.model?.defaults ?? {};
  const show = () => {
    find("#number-shown").textContent = state.n === 1 ? "1 picture" : `${state.n} pictures`;
    field("fewer").disabled = state.n <= 1;
    field("more").disabled = state.n >= 10;
    const { guidance_scale: guidance = "", steps = "" } = { ...defaults(), ...state.touched };
    find("#guidance-shown").textContent = guidance;
    find("#steps-shown").textContent = steps;
    find("#prior-about").textContent = (PRIORS[field("prior").value] ?? ["", ""])[1];
    const { seed, ...rest } = complete(values());
    find("#summary").textContent = summary(field("seed").value ? { seed, ...rest } : rest);
    field("seed").setAttribute("aria-invalid", String(Number(field("seed").value) >= MAX_SEED));
  };

  const keep = () => {
    const kept = { n: state.n, model: state.model?.id, prompt: field("prompt").value, seed: field("seed").value,
      stream: field("stream").checked, touched: state.touched };
    try {
      localStorage.setItem(KEPT, JSON.stringify(kept));
    } catch {
      // The browser keeps nothing; the form then starts anew next time.
    }
    show();
  };

  const applyModel = () => {
    const { steps, guidance_scale: guidance, prior } = { ...defaults(), ...state.touched };
    const dial = (name, value) => { if (typeof value === "number") field(name).value = value; };
    field("prior").replaceChildren(...(state.model?.priors ?? []).map((name) => el("option", { value: name, text: nameOf(name) })));
    if (prior && state.model?.priors.includes(prior)) field("prior").value = prior;
    field("prior").closest(".field").hidden = !state.model?.priors.length;
    dial("guidance", guidance);
    dial("steps", steps);
    field("stream").closest(".check").hidden = !can("stream");
    show();
  };

  function values() {
    const seed = field("seed").value.trim();
    const asked = {
      prompt: field("prompt").value.trim(),
      n: state.n,
      seed: /^\d+$/.test(seed) && Number(seed) < MAX_SEED ? Number(seed) : randomSeed(),
      ...state.touched,
    };
    if (state.model) asked.model = state.model.id;
    if (field("prior").value) asked.prior = field("prior").value;
    else delete asked.prior;
    return asked;
  }

  /** Whether the bundle can do `verb`, one of those that the server lists. */
  const can = (verb) => state.model?.verbs.includes(verb) ?? false;

  /** What a request with these fields is drawn with: the fields, and the bundle's own values for the rest. */
  const complete = (fields) => {
    const own = Object.entries(defaults()).filter(([, value]) => value !== undefined && value !== null);
    return { ...Object.fromEntries(own), ...fields };
  };

  /** Why the form cannot be sent, or null. */
  function problem() {
    const seed = field("seed").value.trim();
    if (!field("prompt").value.trim()) return ["prompt", "Write what you want to see first."];
    if (seed && !(/^\d+$/.test(seed) && Number(seed) < MAX_SEED)) return ["seed", `The seed is a whole number below ${MAX_SEED}.`];
    return null;
  }

  /** Fills the form with the settings of an earlier picture, as far as they make sense. */
  function use(settings) {
    if (state.models.some(({ id }) => id === settings.model)) setModel(settings.model);
    if (typeof settings.prompt === "string") field("prompt").value = settings.prompt.slice(0, 1000);
    if (Number.isInteger(settings.seed)) field("seed").value = settings.seed;
    if (Number.isInteger(settings.n)) state.n = Math.min(10, Math.max(1, settings.n));
    state.touched = {};
    for (const name of ["steps", "guidance_scale"]) {
      if (Number.isFinite(settings[name]) && settings[name] !== defaults()[name]) state.touched[name] = settings[name];
    }
    if (state.model?.priors.includes(settings.prior)) state.touched.prior = settings.prior;
    applyModel();
    keep();
  }

  function setModel(id) {
    state.model = state.models.find((model) => model.id === id) ?? state.models[0] ?? null;
    if (state.model) field("model").value = state.model.id;
    applyModel();
  }

  function setModels(models) {
    state.models = models;
    field("model").replaceChildren(...models.map((model) => el("option", { value: model.id, text: model.id })));
    setModel(state.model?.id ?? restored.model);
  }

  let restored = {};
  try {
    restored = JSON.parse(localStorage.getItem(KEPT) ?? "{}") ?? {};
  } catch {
    // Not ours, or damaged: the form starts anew.
  }
  state.n = Math.min(10, Math.max(1, Number(restored.n) || 4));
  state.touched = restored.touched ?? {};
  field("prompt").value = restored.prompt ?? "";
  field("seed").value = restored.seed ?? "";
  field("stream").checked = restored.stream ?? true;

  const step = (by) => { state.n = Math.min(10, Math.max(1, state.n + by)); keep(); };
  field("fewer").addEventListener("click", () => step(-1));
  field("more").addEventListener("click", () => step(1));
  field("new-seed").addEventListener("click", () => { field("seed").value = randomSeed(); keep(); });
  field("model").addEventListener("change", () => { setModel(field("model").value); keep(); });
  for (const [id, name] of [["guidance", "guidance_scale"], ["steps", "steps"], ["prior", "prior"]]) {
    field(id).addEventListener("input", () => {
      state.touched[name] = id === "prior" ? field(id).value : Number(field(id).value);
      keep();
    });
  }
  for (const id of ["prompt", "seed", "stream"]) field(id).addEventListener("input", keep);
  field("reset").addEventListener("click", () => {
    state.touched = {};
    state.n = 4;
    field("seed").value = "";
    field("stream").checked = true;
    applyModel();
    keep();
  });
  field("toggle-settings").addEventListener("click", () => {
    const hidden = !find("#settings").hidden;
    find("#settings").hidden = hidden;
    field("toggle-settings").setAttribute("aria-expanded", String(!hidden));
  });

  return {
    setModels, values, complete, problem, use,
    get model() { return state.model; },
    /** How many pictures on the way to each picture are asked for. */
    get partials() { return field("stream").checked && can("stream") ? 3 : 0; },
    can,
    /** The side of the pictures that the bundle draws, in pixels. */
    get size() { return Math.max(0, ...(state.model?.sizes ?? [])) || 64; },
  };
}
