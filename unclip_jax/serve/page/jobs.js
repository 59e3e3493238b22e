// Runs of the server: starts one, follows it, and files its pictures in the history.
import { draw } from "./api.js";
import { newId } from "./store.js";
import { readSettings, writeSettings } from "./png.js";

const PACE = "unclip-pace";

/** Seconds that a run of this kind will take by the last such run, or null if there was none. */
function expected(kind, work) {
  try {
    const pace = JSON.parse(localStorage.getItem(PACE) ?? "{}")[kind];
    return pace ? pace.seconds * (0.3 + (0.7 * work) / pace.work) : null;
  } catch {
    return null;
  }
}

function remember(kind, work, seconds) {
  try {
    const paces = JSON.parse(localStorage.getItem(PACE) ?? "{}");
    localStorage.setItem(PACE, JSON.stringify({ ...paces, [kind]: { work, seconds } }));
  } catch {
    // Without storage there is no estimate, and the bar follows the pictures alone.
  }
}

/** The settings of picture `index` of a run, as they stand in its file. Those of an opened file are its own. */
export const settingsOf = (run, index) => (run.kind === "import" ? run.settings : {
  ...run.settings,
  kind: run.kind,
  ...(run.thetas ? { theta: run.thetas[index] } : {}),
  picture: index,
  created: run.created,
  generator: "unclip_jax",
});

/** A PNG with settings in it, beside those that it has. */
export function toBlob(bytes, settings) {
  return new Blob([writeSettings(bytes, { ...readSettings(bytes), ...settings })], { type: "image/png" });
}

/**
 * A run under way: an EventTarget whose `change` says that `pictures`, `fraction` or `secondsLeft` are new. `done`
 * resolves to the saved run with its blobs, or null if it was cancelled; it rejects with an ApiError.
 */
export class Job extends EventTarget {
  constructor(options, store) {
    super();
    const { kind, title, path, fields, files = null, count, partials = 0, settings, thetas = null } = options;
    const run = { id: newId(), kind, title, created: new Date().toISOString(), settings, thetas, pictures: [] };
    Object.assign(this, { options, run, count, partials, pictures: Array(count).fill(null), fraction: null, secondsLeft: null });
    this.abort = new AbortController();
    this.started = performance.now();
    this.work = count * (settings.steps ?? 32);
    this.expected = expected(kind, this.work);
    this.seen = Array(count).fill(-1);
    this.ticker = setInterval(() => this.tick(), 200);
    this.done = this.perform({ path, fields, files, partials, store }).finally(() => clearInterval(this.ticker));
  }

  cancel() {
    this.abort.abort();
  }

  get elapsed() {
    return (performance.now() - this.started) / 1000;
  }

  /** Progress by the clock, corrected by the pictures that have come. */
  tick() {
    // The pictures may be drawn at once or one after another, so it is their mean that counts.
    const seen = this.seen.reduce((sum, k) => sum + k + 1, 0) / this.count;
    const bySteps = this.partials ? seen / (this.partials + 1) : 0;
    const byClock = this.expected ? Math.min(0.97, this.elapsed / this.expected) : 0;
    // The clock may run ahead of the pictures by one interval, no further; unless none come: a server sends the
    // pictures of a program that it has not compiled yet at their end alone.
    const step = 1 / (this.partials + 1);
    const interval = seen || byClock < 2 * step ? step : 1;
    this.fraction = this.expected || bySteps ? Math.max(bySteps, Math.min(byClock, bySteps + interval)) : null;
    const total = bySteps > 0 ? this.elapsedAtPicture / bySteps : this.expected;
    this.secondsLeft = total ? Math.max(0, total - this.elapsed) : null;
    this.dispatchEvent(new Event("change"));
  }

  async perform({ path, fields, files, partials, store }) {
    const onPartial = (index, bytes, step) => {
      if (index >= this.count) return;
      this.pictures[index] = new Blob([bytes], { type: "image/png" });
      this.seen[index] = step ?? this.seen[index] + 1;
      this.elapsedAtPicture = this.elapsed;
      this.tick();
    };
    let answer;
    try {
      answer = await draw(path, fields, { files, partials, onPartial, signal: this.abort.signal });
    } catch (error) {
      if (error.name === "AbortError") return null;
      throw error;
    }
    const run = this.run;
    run.seconds = this.elapsed;
    if (answer.seed !== null) run.settings = { ...run.settings, seed: answer.seed };
    remember(run.kind, this.work, run.seconds);
    const blobs = {};
    answer.pictures.forEach((bytes, index) => {
      const id = newId();
      run.pictures.push(id);
      blobs[id] = toBlob(bytes, settingsOf(run, index));
    });
    await store.save(run, blobs);
    return { run, blobs: run.pictures.map((id) => blobs[id]) };
  }
}
