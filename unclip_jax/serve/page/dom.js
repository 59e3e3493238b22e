// Small helpers for the document. Text never becomes HTML: captions and messages are data.

export const find = (selector, root = document) => root.querySelector(selector);
export const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];

/**
 * Makes an element. `attributes` take strings, true for an attribute without a value, functions for events
 * (`onclick`), and `class`, `text`, `dataset`. Children are nodes or strings; null and false are left out.
 */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else if (name === "dataset") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An icon of the sprite in index.html. It is decoration: the control that holds it carries the name. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon and a name; `quiet` shows the icon alone and gives the name as a tooltip. */
export function button(name, onclick, { icon: image, quiet = false, ...attributes } = {}) {
  const shown = quiet ? [icon(image)] : [image && icon(image), el("span", { text: name })];
  const named = quiet ? { "aria-label": name, title: name } : {};
  const style = `button ${quiet ? "quiet" : ""} ${attributes.class ?? ""}`.trim();
  return el("button", { type: "button", ...attributes, ...named, class: style, onclick }, ...shown);
}

const MAX_NOTICES = 3;

/** Tells something in words at the foot of the page. `action` is {name, run}. */
export function notify(message, { kind = "info", action = null, seconds = 6 } = {}) {
  const box = el("div", { class: `notice ${kind}` }, el("p", { text: message }));
  const close = () => box.remove();
  if (action) box.append(button(action.name, () => { close(); action.run(); }, { class: "small" }));
  box.append(button("Dismiss", close, { icon: "close", quiet: true, class: "small" }));
  // A modal dialog makes the rest of the page inert, so the notice goes where it can be seen and clicked.
  const holder = findAll("dialog[open] .notices").pop() ?? find("body > .notices");
  // Few enough to leave the page in sight.
  while (holder.childElementCount >= MAX_NOTICES) holder.firstElementChild.remove();
  holder.append(box);
  // An error stays until it is dismissed.
  if (kind !== "error") setTimeout(close, seconds * 1000);
  return close;
}

/** Shows a dialog, closes it on a click beside it, and gives the focus back when it closes. */
export function openDialog(dialog) {
  const before = document.activeElement;
  dialog.showModal();
  dialog.addEventListener("close", () => before?.isConnected && before.focus(), { once: true });
}

/** "4 s", "1 min 20 s". */
export function duration(seconds) {
  const whole = Math.max(1, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  const rest = whole % 60;
  return rest ? `${Math.floor(whole / 60)} min ${rest} s` : `${whole / 60} min`;
}

/** What a run under way says of its time: `job` has secondsLeft, elapsed and expected. */
export function timeLeft({ secondsLeft, elapsed, expected }) {
  if (expected && elapsed > 2 * expected + 2) return "longer than usual";
  if (secondsLeft === null) return duration(elapsed);
  return secondsLeft < 0.5 ? "almost done" : `${duration(secondsLeft)} left`;
}

/** Whether the person types into the element, so that a letter is text and no command. */
export const isTyping = (target) =>
  target instanceof HTMLElement && target.closest("input:not([type=range]):not([type=checkbox]), textarea, select");

/** Hands the browser a file to save. */
export function saveFile(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
