// One picture, large: its settings, the way to its neighbours, and what can be made of it.
import { button, el, find, findAll, notify, openDialog, saveFile, timeLeft } from "./dom.js";
import { altText } from "./gallery.js";
import { settingsOf, toBlob } from "./jobs.js";
import { described } from "./settings.js";

/** `verbs` are the panels of verbs.js; `onEdit`, `onUse` take the shown picture's {blob, title, settings}. */
export function createViewer({ store, addresses, settings, verbs, onEdit, onUse, onDelete }) {
  const dialog = find("#viewer"), stage = find("#stage"), strip = find("#strip"), slide = find("#slide");
  const tabs = find("#tabs"), panel = find("#tab-panel"), title = find("#viewer-title");
  const TABS = [["about", "About"], ...verbs.panels.map(({ name, title: text }) => [name, text])];
  // What is shown: a run of the history, or one under way, and then also what was shown before it.
  let run = null, job = null, at = 0, tab = "about", before = null;

  const image = el("img", { id: "shown" });
  const previous = button("Previous picture", () => go(-1), { icon: "left", quiet: true, class: "previous" });
  const next = button("Next picture", () => go(1), { icon: "right", quiet: true, class: "next" });
  stage.append(image, previous, next);
  const editNode = button("Edit", edit, { icon: "brush", class: "small" });
  find("#viewer-actions").append(
    editNode,
    button("Download", download, { icon: "download", class: "small" }));
  const tabNodes = TABS.map(([name, text]) => el("button", {
    type: "button", role: "tab", class: "tab", id: `tab-${name}`, "aria-controls": "tab-panel", text, onclick: () => openTab(name),
  }));
  tabs.append(...tabNodes);

  const total = () => (job ? job.count : run.pictures.length);
  const shownSettings = () => settingsOf(run, at);

  async function picture() {
    return { blob: await store.picture(run.pictures[at]), title: run.title, settings: shownSettings(), url: image.src };
  }

  async function show(index) {
    at = (index + total()) % total();
    findAll(".tile", strip).forEach((node, i) => {
      node.setAttribute("aria-current", String(i === at));
      if (i === at) node.scrollIntoView({ block: "nearest", inline: "nearest" });
    });
    const input = find("input", slide);
    if (input) {
      input.value = at;
      find("output", slide).textContent = thetaOf(at);
      input.setAttribute("aria-valuetext", thetaOf(at));
    }
    if (job) {
      // Until there is something to see, the picture from before stays, paler.
      const source = stripSources.get(at);
      image.classList.toggle("pale", !source);
      if (source) image.src = source.url;
    } else {
      const wanted = run.pictures[at];
      const url = await addresses.of(wanted);
      if (run?.pictures[at] !== wanted) return;
      image.classList.remove("pale");
      image.src = url;
      image.alt = altText(run, at);
    }
    if (tab === "about") fillAbout();
  }

  const go = (by) => { if (total() > 1) show(at + by); };

  const thetaOf = (index) => {
    const theta = (run.thetas ?? [])[index];
    return theta === undefined ? "" : `θ ${theta.toFixed(2)}`;
  };

  // A slider for what lies on a path: it follows along with the pictures.
  function fillSlide() {
    const ends = { interpolate: ["first", "second"], text_diff: ["as it is", "changed"] }[run.kind];
    slide.hidden = !ends || total() < 2;
    if (slide.hidden) return slide.replaceChildren();
    slide.replaceChildren(el("span", { text: ends[0] }),
      el("input", { type: "range", min: 0, max: total() - 1, step: 1, "aria-label": "Theta", oninput: (event) => show(Number(event.target.value)) }),
      el("span", { text: ends[1] }), el("output"));
  }

  const stripSources = new Map();
  function forgetSources() {
    for (const { url } of stripSources.values()) URL.revokeObjectURL(url);
    stripSources.clear();
  }

  function fillStrip() {
    forgetSources();
    const many = total() > 1;
    previous.hidden = next.hidden = !many || Boolean(job);
    strip.replaceChildren(...(many ? Array.from({ length: total() }, (_, index) => {
      const small = el("img", { alt: "", hidden: Boolean(job) });
      if (!job) addresses.of(run.pictures[index]).then((url) => { small.src = url; });
      return el("button", { type: "button", class: job ? "tile waiting" : "tile", "aria-label": `Picture ${index + 1}`, onclick: () => show(index) }, small);
    }) : []));
    fillSlide();
  }

  async function open(chosen, index = 0) {
    leave();
    run = chosen;
    title.textContent = run.title;
    fillStrip();
    // The bundle may not have the parts for every verb.
    editNode.hidden = !settings.can("edits");
    for (const { name, verb } of verbs.panels) find(`#tab-${name}`).hidden = !settings.can(verb);
    if (!dialog.open) openDialog(dialog);
    await show(index);
    await openTab("about");
    // Not on a tab, where the arrow keys would change tabs and not pictures.
    (next.hidden ? find("#viewer-actions button:not([hidden])") : next).focus();
  }

  /** Looks no longer at the run under way, which goes on in the feed; what was shown before it is shown again. */
  function leave() {
    if (!job) return;
    job = null;
    find(".progress", stage)?.remove();
    ({ run, at } = before);
  }

  /** Follows a run that a panel started, then shows what it drew, with the panel still open. */
  async function follow(started) {
    before = { run, at };
    job = started;
    run = started.run;
    fillStrip();
    show(0);
    const meter = el("progress", { max: 1, "aria-label": "Progress" }), left = el("span", { class: "left" });
    const box = el("div", { class: "progress" }, meter, left);
    const stop = button("Stop", () => started.cancel());
    const send = find("button.primary", panel);
    send?.replaceWith(stop);
    stop.focus({ preventScroll: true });
    // On a phone the picture may be out of sight.
    stage.scrollIntoView({ block: "nearest" });
    stage.append(box);
    started.addEventListener("change", () => {
      if (started.fraction === null) meter.removeAttribute("value");
      else meter.value = started.fraction;
      left.textContent = timeLeft(started);
      if (job !== started) return;
      started.pictures.forEach((blob, index) => {
        if (!blob || stripSources.get(index)?.blob === blob) return;
        if (stripSources.has(index)) URL.revokeObjectURL(stripSources.get(index).url);
        stripSources.set(index, { blob, url: URL.createObjectURL(blob) });
        const small = findAll("img", strip)[index];
        if (small) Object.assign(small, { src: stripSources.get(index).url, hidden: false });
        if (index === at) {
          image.src = stripSources.get(index).url;
          image.classList.remove("pale");
        }
      });
    });
    const settle = async (shown, index) => {
      const focused = stop === document.activeElement;
      if (send) stop.replaceWith(send);
      if (focused) send.focus({ preventScroll: true });
      if (job !== started) return;
      leave();
      run = shown;
      title.textContent = run.title;
      fillStrip();
      await show(index);
    };
    try {
      const result = await started.done;
      if (result) await settle(result.run, 0);
      else await settle(before.run, before.at);
    } catch (error) {
      await settle(before.run, before.at);
      notify(error.message, { kind: "error" });
    }
  }

  function fillAbout() {
    if (job) return panel.replaceChildren();
    const facts = described(shownSettings()).map(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })]);
    panel.replaceChildren(
      el("dl", { class: "facts" }, facts),
      run.settings.prompt && button("Use these settings", () => { dialog.close(); onUse(shownSettings()); }, { icon: "reuse" }),
      button("Delete", () => { dialog.close(); onDelete(run); }, { icon: "trash" }));
  }

  async function openTab(name) {
    if (job && name !== tab) {
      leave();
      fillStrip();
      await show(at);
    }
    tab = name;
    for (const node of tabNodes) {
      const chosen = node.id === `tab-${name}`;
      node.setAttribute("aria-selected", String(chosen));
      node.tabIndex = chosen ? 0 : -1;
    }
    panel.setAttribute("aria-labelledby", `tab-${name}`);
    if (name === "about") return fillAbout();
    const source = await picture();
    const { build } = verbs.panels.find((one) => one.name === name);
    panel.replaceChildren(...build(source, follow));
  }

  async function turnTo(name) {
    if (find(`#tab-${name}`).hidden) return;
    await openTab(name);
    find("input:not([hidden]), button", panel)?.focus();
  }

  async function edit() {
    if (job || editNode.hidden) return;
    const chosen = await picture();
    dialog.close();
    onEdit(chosen);
  }

  async function download() {
    if (job) return;
    const { blob, settings } = await picture();
    const bytes = new Uint8Array(await blob.arrayBuffer());
    const words = run.title.normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60);
    saveFile(toBlob(bytes, settings), `${words || "unclip"}-${settings.seed ?? at + 1}-${at + 1}.png`);
  }

  find("[data-close]", dialog).addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    leave();
    forgetSources();
  });
  tabs.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    const shown = tabNodes.filter((node) => !node.hidden);
    const place = (shown.findIndex((node) => node.tabIndex === 0) + by + shown.length) % shown.length;
    shown[place].click();
    shown[place].focus();
  });
  // On the document: if the control that had the focus is gone, keys arrive at the body.
  document.addEventListener("keydown", (event) => {
    if (!dialog.open || event.target.closest("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const letter = event.key.toLowerCase();
    const keys = {
      arrowleft: () => go(-1), arrowright: () => go(1), e: edit, d: download,
      v: () => turnTo("variation"), i: () => turnTo("interpolate"), t: () => turnTo("text_diff"),
    };
    if (!keys[letter] || job) return;
    event.preventDefault();
    keys[letter]();
  });

  return { open, get isOpen() { return dialog.open; } };
}
