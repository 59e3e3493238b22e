// Shows a sheet on a canvas: zoom, pan, the brush, the frame; mouse, pen, touch and keys.
import { el } from "./dom.js";
import { makeCanvas } from "./sheet.js";

const CHECK = 8, MARGIN = 48, STRIPE = 12;
export const MIN_ZOOM = 0.05, MAX_ZOOM = 64;

/** A tile of diagonal stripes, half transparent. */
function stripePattern() {
  const tile = makeCanvas(STRIPE, STRIPE);
  const pixels = new ImageData(STRIPE, STRIPE);
  for (let i = 0; i < STRIPE * STRIPE; i++) {
    const light = ((i % STRIPE) + Math.floor(i / STRIPE)) % STRIPE < STRIPE / 2;
    pixels.data.set(light ? [255, 255, 255, 150] : [255, 98, 24, 190], 4 * i);
  }
  tile.getContext("2d").putImageData(pixels, 0, 0);
  return tile;
}

/** `onChange` is called after every change of the sheet, the tool, the size or the zoom. */
export function createEasel(holder, onChange) {
  const canvas = el("canvas", { class: "sheet", tabindex: "0", role: "application", "aria-label": "Picture. Arrow keys move, space paints." });
  const hint = el("p", { class: "hint" });
  holder.replaceChildren(canvas, hint);
  const context = canvas.getContext("2d");
  const easel = { sheet: null, tool: "brush", radius: 4, candidate: null, locked: false };
  const camera = { x: 0, y: 0, zoom: 1 };
  const pointers = new Map(), stripes = makeCanvas(1, 1), pattern = stripePattern();
  let action = null, cursor = null, mask = null, frame = null, spaceHeld = false, keyed = false, waiting = false;
  let overlay = null, overlaid = null, fresh = null, fitted = true;

  const toSheet = (event) => {
    const box = canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) / camera.zoom + camera.x, y: (event.clientY - box.top) / camera.zoom + camera.y };
  };
  const colour = (name) => getComputedStyle(canvas).getPropertyValue(name);

  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; paint(); });
  }

  function maskPicture(state, shown) {
    const { width, height } = state;
    const same = overlaid === shown && overlay.width === width && overlay.height === height;
    if (same && !fresh) return overlay;
    const area = same ? fresh : { x: 0, y: 0, width, height };
    if (!same) overlay = makeCanvas(width, height);
    overlaid = shown;
    fresh = null;
    if (!area.width || !area.height) return overlay;
    const pixels = new ImageData(area.width, area.height);
    const words = new Uint32Array(pixels.data.buffer);
    for (let y = 0; y < area.height; y++) {
      const from = (area.y + y) * width + area.x;
      for (let x = 0; x < area.width; x++) if (shown[from + x]) words[y * area.width + x] = 0xffffffff;
    }
    overlay.getContext("2d").putImageData(pixels, area.x, area.y);
    return overlay;
  }

  /** Paints into the mask of the stroke, and keeps in mind what has to be shown anew. */
  function stroke(from, to) {
    const area = easel.sheet.stroke(mask, from, to, easel.radius, value());
    if (!fresh) {
      fresh = area;
      return;
    }
    const x = Math.min(fresh.x, area.x), y = Math.min(fresh.y, area.y);
    const right = Math.max(fresh.x + fresh.width, area.x + area.width);
    const bottom = Math.max(fresh.y + fresh.height, area.y + area.height);
    fresh = { x, y, width: right - x, height: bottom - y };
  }

  function paint() {
    const { sheet } = easel;
    const box = canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1;
    if (!sheet || !box.width) return;
    const [width, height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const state = sheet.state, side = sheet.side, place = frame ?? state.frame;
    const { zoom } = camera;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, box.width, box.height);
    const rectangle = (x, y, w, h) => [(x - camera.x) * zoom, (y - camera.y) * zoom, w * zoom, h * zoom];
    const picture = rectangle(state.x, state.y, state.width, state.height);
    const window_ = rectangle(place.x, place.y, side, side);
    for (const area of [picture, window_]) checks(area, box);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(state.canvas, ...picture);
    if (easel.candidate) context.drawImage(easel.candidate, ...window_);
    else {
      hatch(maskPicture(state, mask ?? state.mask), picture, ratio);
    }
    // What lies outside the frame is not sent; it is shown paler.
    context.save();
    context.beginPath();
    context.rect(0, 0, box.width, box.height);
    context.rect(window_[0] + window_[2], window_[1], -window_[2], window_[3]);
    context.clip();
    context.globalAlpha = 0.55;
    context.fillStyle = colour("--raised");
    context.fillRect(...picture);
    context.restore();
    context.lineWidth = 2;
    context.strokeStyle = colour("--accent");
    context.strokeRect(...window_);
    if (cursor && !easel.locked && painting()) ring(cursor);
  }

  // The mask in stripes of two colours, which can be seen on any picture.
  function hatch(shape, [x, y, w, h], ratio) {
    const { width, height } = canvas;
    if (stripes.width !== width || stripes.height !== height) Object.assign(stripes, { width, height });
    const over = stripes.getContext("2d");
    over.globalCompositeOperation = "source-over";
    over.clearRect(0, 0, width, height);
    over.imageSmoothingEnabled = false;
    over.drawImage(shape, x * ratio, y * ratio, w * ratio, h * ratio);
    over.globalCompositeOperation = "source-in";
    over.fillStyle = over.createPattern(pattern, "repeat");
    over.fillRect(0, 0, width, height);
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.drawImage(stripes, 0, 0);
    context.restore();
  }

  function checks([x, y, w, h], box) {
    context.save();
    context.beginPath();
    context.rect(x, y, w, h);
    context.clip();
    context.fillStyle = colour("--card");
    context.fillRect(x, y, w, h);
    context.fillStyle = colour("--line");
    for (let row = Math.max(0, Math.floor(-y / CHECK)); row * CHECK < Math.min(h, box.height - y); row++) {
      for (let column = Math.max(0, Math.floor(-x / CHECK)); column * CHECK < Math.min(w, box.width - x); column++) {
        if ((row + column) % 2) context.fillRect(x + column * CHECK, y + row * CHECK, CHECK, CHECK);
      }
    }
    context.restore();
  }

  function ring(point) {
    const [x, y] = [(point.x - camera.x) * camera.zoom, (point.y - camera.y) * camera.zoom];
    for (const [style, line] of [["#fff", 3], ["#000", 1.25]]) {
      context.beginPath();
      context.arc(x, y, Math.max(1.5, easel.radius * camera.zoom), 0, 2 * Math.PI);
      context.strokeStyle = style;
      context.lineWidth = line;
      context.stroke();
    }
  }

  const painting = () => (easel.tool === "brush" || easel.tool === "eraser") && !spaceHeld;
  const value = () => (easel.tool === "eraser" ? 0 : 1);

  // As long as nobody has zoomed or panned, everything stays in view.
  function changed() {
    if (fitted && easel.sheet) look();
    redraw();
    onChange();
  }

  // One pointer paints, moves the frame or pans; two pan and zoom, and take back what the first began.
  function down(event) {
    if (!easel.sheet) return;
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    canvas.focus({ preventScroll: true });
    if (pointers.size === 2) {
      action = { kind: "pinch", ...spread(), camera: { ...camera } };
      mask = frame = null;
      return redraw();
    }
    if (pointers.size > 2) return;
    const point = toSheet(event);
    const pans = easel.tool === "hand" || spaceHeld || event.button === 1 || easel.locked;
    if (pans) action = { kind: "pan", x: event.clientX, y: event.clientY, camera: { ...camera } };
    else if (easel.tool === "frame") action = { kind: "frame", from: point, start: easel.sheet.state.frame };
    else if (event.button === 0) {
      action = { kind: "paint", last: point };
      mask = easel.sheet.state.mask.slice();
      stroke(point, point);
    }
    canvas.classList.add("dragging");
    redraw();
  }

  function spread() {
    const [a, b] = [...pointers.values()];
    const box = canvas.getBoundingClientRect();
    return { distance: Math.hypot(a.x - b.x, a.y - b.y) || 1, x: (a.x + b.x) / 2 - box.left, y: (a.y + b.y) / 2 - box.top };
  }

  function move(event) {
    if (!easel.sheet) return;
    cursor = toSheet(event);
    keyed = false;
    if (pointers.has(event.pointerId)) pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (action?.kind === "pinch" && pointers.size === 2) {
      const now = spread(), before = action.camera;
      fitted = false;
      camera.zoom = Math.min(MAX_ZOOM, Math.max(MIN_ZOOM, (before.zoom * now.distance) / action.distance));
      camera.x = before.x + action.x / before.zoom - now.x / camera.zoom;
      camera.y = before.y + action.y / before.zoom - now.y / camera.zoom;
      onChange();
    } else if (action?.kind === "pan") {
      fitted = false;
      camera.x = action.camera.x - (event.clientX - action.x) / camera.zoom;
      camera.y = action.camera.y - (event.clientY - action.y) / camera.zoom;
    } else if (action?.kind === "frame") {
      const { start, from } = action;
      frame = easel.sheet.placeFrame({ x: start.x + cursor.x - from.x, y: start.y + cursor.y - from.y });
    } else if (action?.kind === "paint") {
      for (const step of event.getCoalescedEvents?.().length ? event.getCoalescedEvents() : [event]) {
        const point = toSheet(step);
        stroke(action.last, point);
        action.last = point;
      }
    }
    redraw();
  }

  function up(event) {
    pointers.delete(event.pointerId);
    if (action?.kind === "pinch" && pointers.size) return;
    if (event.type === "pointercancel") mask = frame = null;
    commit();
    action = null;
    canvas.classList.remove("dragging");
    if (event.pointerType === "touch") cursor = null;
    changed();
  }

  function commit() {
    if (mask) easel.sheet.push({ mask });
    if (frame) easel.sheet.push({ frame });
    mask = frame = null;
  }

  function zoomBy(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const zoom = Math.min(MAX_ZOOM, Math.max(MIN_ZOOM, camera.zoom * factor));
    fitted = false;
    camera.x += x / camera.zoom - x / zoom;
    camera.y += y / camera.zoom - y / zoom;
    camera.zoom = zoom;
    changed();
  }

  /** Shows the picture and the frame, as large as they fit, until somebody zooms or pans. */
  function fit() {
    fitted = true;
    changed();
  }

  function look() {
    const { state, side } = easel.sheet;
    const x = Math.min(state.x, state.frame.x), y = Math.min(state.y, state.frame.y);
    const width = Math.max(state.x + state.width, state.frame.x + side) - x;
    const height = Math.max(state.y + state.height, state.frame.y + side) - y;
    const margin = Math.min(MARGIN, canvas.clientWidth / 12);
    const room = (length, size) => Math.max(1, length - 2 * margin) / size;
    camera.zoom = Math.min(MAX_ZOOM, room(canvas.clientWidth, width), room(canvas.clientHeight, height));
    camera.x = x + width / 2 - canvas.clientWidth / 2 / camera.zoom;
    camera.y = y + height / 2 - canvas.clientHeight / 2 / camera.zoom;
  }

  function key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const { sheet } = easel;
    if (event.key === " ") {
      event.preventDefault();
      if (easel.locked) return;
      // After the arrow keys, space paints; with the mouse it turns the brush into the hand.
      if (painting() && cursor && keyed && !pointers.size) {
        mask = sheet.state.mask.slice();
        stroke(cursor, cursor);
        commit();
        return changed();
      }
      spaceHeld = true;
      return redraw();
    }
    if (!steps || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    const [dx, dy] = steps;
    if (easel.tool === "hand" || easel.locked) {
      fitted = false;
      camera.x += (40 * dx) / camera.zoom;
      camera.y += (40 * dy) / camera.zoom;
    } else if (easel.tool === "frame") {
      const by = event.shiftKey ? 1 : Math.max(1, Math.round(sheet.side / 8));
      const { frame: old } = sheet.state;
      const place = sheet.placeFrame({ x: old.x + by * dx, y: old.y + by * dy });
      if (place.x !== old.x || place.y !== old.y) sheet.push({ frame: place });
    } else {
      const by = event.shiftKey ? 1 : Math.max(1, Math.round(sheet.side / 16));
      const { frame: at } = sheet.state;
      keyed = true;
      cursor ??= { x: at.x + sheet.side / 2, y: at.y + sheet.side / 2 };
      cursor = { x: cursor.x + by * dx, y: cursor.y + by * dy };
    }
    changed();
  }

  canvas.addEventListener("pointerdown", down);
  canvas.addEventListener("pointermove", move);
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  canvas.addEventListener("pointerleave", () => { if (!action) { cursor = null; redraw(); } });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("keydown", key);
  canvas.addEventListener("keyup", (event) => { if (event.key === " ") { spaceHeld = false; redraw(); } });
  canvas.addEventListener("blur", () => { spaceHeld = false; });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoomBy(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  new ResizeObserver(changed).observe(canvas);

  return Object.assign(easel, {
    canvas, hint, changed, fit, zoomBy,
    zoom: () => camera.zoom,
    /** Where a point of the sheet is in the window, in CSS pixels. */
    toWindow(point) {
      const box = canvas.getBoundingClientRect();
      return { x: box.left + (point.x - camera.x) * camera.zoom, y: box.top + (point.y - camera.y) * camera.zoom };
    },
  });
}
