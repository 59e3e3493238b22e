// The feed: runs under way on top, then the history, newest first.
import { button, duration, el, find, notify, timeLeft } from "./dom.js";
import { kindName, summary } from "./settings.js";

const PAGE = 24;

/** Gives pictures an address while the page is open. */
export function createAddresses(store) {
  const urls = new Map();
  return {
    async of(id) {
      if (!urls.has(id)) {
        const blob = await store.picture(id);
        if (blob && !urls.has(id)) urls.set(id, URL.createObjectURL(blob));
      }
      return urls.get(id) ?? "";
    },
    forget(id) {
      if (urls.has(id)) URL.revokeObjectURL(urls.get(id));
      urls.delete(id);
    },
  };
}

/** What a picture shows, for those who do not see it. */
export const altText = (run, index) =>
  run.pictures.length > 1 ? `${run.title}, picture ${index + 1} of ${run.pictures.length}` : run.title;

const when = (created) => {
  const date = new Date(created);
  const today = new Date().toDateString() === date.toDateString();
  return date.toLocaleString([], today ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" });
};

/** `onOpen(run, index)`, `onUse(settings)`, `onRetry(job)`, and `onKey()` where the server asks for a key. */
export function createGallery({ store, addresses, onOpen, onUse, onRetry, onKey }) {
  const feed = find("#feed"), empty = find("#empty"), end = find("#feed-end");
  let runs = [], shown = 0;

  const showEmpty = () => { empty.hidden = feed.childElementCount > 0; };

  function tile(run, index) {
    const image = el("img", { alt: altText(run, index), decoding: "async" });
    addresses.of(run.pictures[index]).then((url) => { image.src = url; });
    return el("button", { type: "button", class: "tile", onclick: () => onOpen(run, index) }, image);
  }

  function card(run) {
    const about = [kindName(run.kind), summary(run.settings), run.seconds && duration(run.seconds), when(run.created)];
    const actions = [button("Delete", () => remove(run), { icon: "trash", quiet: true, class: "small" })];
    if (run.kind === "generation") {
      actions.unshift(button("Use these settings", () => onUse(run.settings), { icon: "reuse", quiet: true, class: "small" }));
    }
    return el("article", { class: "run", dataset: { run: run.id }, "aria-label": run.title },
      el("div", { class: "run-top" },
        el("div", { class: "run-words" },
          el("h2", { class: "run-title", text: run.title }),
          el("p", { class: "run-about", text: about.filter(Boolean).join(" · ") })),
        el("div", { class: "actions" }, actions)),
      el("div", { class: "grid" }, run.pictures.map((_, index) => tile(run, index))));
  }

  function showMore() {
    const next = runs.slice(shown, shown + PAGE);
    shown += next.length;
    feed.append(...next.map(card));
  }

  async function remove(run) {
    const blobs = {};
    for (const id of run.pictures) blobs[id] = await store.picture(id);
    await store.remove(run);
    const place = runs.indexOf(run);
    runs.splice(place, 1);
    const node = find(`[data-run="${run.id}"]`, feed);
    const next = node?.nextElementSibling;
    node?.remove();
    shown -= 1;
    run.pictures.forEach(addresses.forget);
    showEmpty();
    (find("button", next ?? feed) ?? find("#prompt")).focus();
    const restore = async () => {
      await store.save(run, blobs);
      runs.splice(place, 0, run);
      shown += 1;
      feed.insertBefore(card(run), next?.isConnected ? next : null);
      showEmpty();
    };
    notify(`Deleted: ${run.title}`, { action: { name: "Undo", run: restore } });
  }

  /** A card that follows a run under way and turns into that of the finished run. */
  function follow(job) {
    const images = job.pictures.map(() => el("img", { alt: "", hidden: true }));
    const tiles = images.map((image) => el("div", { class: "tile waiting" }, image));
    const bar = el("progress", { max: 1, "aria-label": "Progress" });
    const left = el("span", { class: "left", text: "" });
    const cancel = button("Stop", () => job.cancel(), { class: "small" });
    const node = el("article", { class: "run", "aria-busy": "true", "aria-label": job.run.title },
      el("div", { class: "run-top" },
        el("div", { class: "run-words" },
          el("h2", { class: "run-title", text: job.run.title }),
          el("p", { class: "run-about", text: [kindName(job.run.kind), summary(job.run.settings)].filter(Boolean).join(" · ") }))),
      el("div", { class: "progress" }, bar, left, cancel),
      el("div", { class: "grid" }, tiles));
    const sources = new Map();
    job.addEventListener("change", () => {
      if (job.fraction === null) bar.removeAttribute("value");
      else bar.value = job.fraction;
      left.textContent = timeLeft(job);
      job.pictures.forEach((blob, index) => {
        if (!blob || sources.get(index)?.blob === blob) return;
        if (sources.has(index)) URL.revokeObjectURL(sources.get(index).url);
        sources.set(index, { blob, url: URL.createObjectURL(blob) });
        images[index].src = sources.get(index).url;
        images[index].hidden = false;
        tiles[index].classList.add("seen");
      });
    });
    feed.prepend(node);
    showEmpty();
    const finish = (replacement) => {
      const focused = node.contains(document.activeElement);
      if (replacement) node.replaceWith(replacement);
      else node.remove();
      if (focused) (replacement ? find("button", replacement) : find("#prompt")).focus();
      for (const { url } of sources.values()) URL.revokeObjectURL(url);
      showEmpty();
    };
    job.done.then((result) => {
      if (!result) return finish(null);
      runs.unshift(result.run);
      shown += 1;
      finish(card(result.run));
    }, (error) => {
      finish(null);
      // Whoever started a quiet run tells of its error.
      if (job.options.quiet) return;
      const action = error.status === 401 ? { name: "Enter the key", run: onKey } : { name: "Try again", run: () => onRetry(job) };
      notify(error.message, { kind: "error", action });
    });
    return job;
  }

  /** Shows a run that was saved elsewhere. */
  function add(run) {
    runs.unshift(run);
    shown += 1;
    feed.prepend(card(run));
    showEmpty();
  }

  const watch = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting) || shown >= runs.length) return;
    showMore();
    // Asks again: the end may still be in sight.
    watch.unobserve(end);
    watch.observe(end);
  }, { rootMargin: "800px" });
  watch.observe(end);

  return {
    follow, add, remove,
    async load() {
      runs = await store.runs();
      shown = 0;
      feed.replaceChildren();
      showMore();
      showEmpty();
    },
    get runs() { return runs; },
  };
}
