// What the editor edits: a picture on a sheet that grows, a mask over it, and the square frame that is sent to the
// server. All coordinates are pixels of the sheet; the picture's first corner starts at (0, 0).
//
// A state is never changed after it was made, so undo and redo only change which state is shown:
// {x, y, width, height, canvas, mask, frame: {x, y}, edits}; mask has one byte per pixel, 1 where it is drawn anew;
// edits are the settings of the pictures that were put into the frame, in order.

export const MAX_SIDE = 4096;
const MAX_BYTES = 128 * 2 ** 20, MIN_STATES = 3, MAX_STATES = 60;

export function makeCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

export const canvasBlob = (canvas) =>
  new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The browser cannot write this picture."))), "image/png"));

/** Sets the pixels within `radius` of the line from `a` to `b`, in place. Returns what changed: {x, y, width, height}. */
export function paintLine(mask, width, height, a, b, radius, value) {
  const [dx, dy] = [b.x - a.x, b.y - a.y];
  const length = dx * dx + dy * dy;
  const low = (p, q) => Math.max(0, Math.floor(Math.min(p, q) - radius));
  const [lowX, lowY] = [low(a.x, b.x), low(a.y, b.y)];
  const highX = Math.min(width - 1, Math.ceil(Math.max(a.x, b.x) + radius));
  const highY = Math.min(height - 1, Math.ceil(Math.max(a.y, b.y) + radius));
  for (let y = lowY; y <= highY; y++) {
    for (let x = lowX; x <= highX; x++) {
      // The distance from the pixel's middle to the nearest point of the line.
      const [px, py] = [x + 0.5 - a.x, y + 0.5 - a.y];
      const along = length ? Math.min(1, Math.max(0, (px * dx + py * dy) / length)) : 0;
      const [ex, ey] = [px - along * dx, py - along * dy];
      if (ex * ex + ey * ey <= radius * radius) mask[y * width + x] = value;
    }
  }
  return { x: lowX, y: lowY, width: Math.max(0, highX - lowX + 1), height: Math.max(0, highY - lowY + 1) };
}

export class Sheet {
  /** `image` is drawable; its short side becomes `side`, that of the frame. A very long image is cropped to its middle. */
  constructor(image, side) {
    const scale = side / Math.min(image.width, image.height);
    const width = Math.min(MAX_SIDE, Math.max(side, Math.round(image.width * scale)));
    const height = Math.min(MAX_SIDE, Math.max(side, Math.round(image.height * scale)));
    const canvas = makeCanvas(width, height);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    const [wide, high] = [Math.round(image.width * scale), Math.round(image.height * scale)];
    context.drawImage(image, Math.round((width - wide) / 2), Math.round((height - high) / 2), wide, high);
    this.side = side;
    const frame = { x: Math.floor((width - side) / 2), y: Math.floor((height - side) / 2) };
    this.states = [{ x: 0, y: 0, width, height, canvas, mask: new Uint8Array(width * height), frame, edits: [] }];
    this.at = 0;
  }

  get state() {
    return this.states[this.at];
  }

  /** Makes a changed state the present one; states that were undone are gone. */
  push(change) {
    this.states.length = this.at + 1;
    this.states.push({ ...this.state, ...change });
    const each = 5 * this.states.at(-1).width * this.states.at(-1).height;
    const room = Math.min(MAX_STATES, Math.max(MIN_STATES, Math.floor(MAX_BYTES / each)));
    this.states.splice(0, Math.max(0, this.states.length - room));
    this.at = this.states.length - 1;
  }

  get canUndo() { return this.at > 0; }
  get canRedo() { return this.at < this.states.length - 1; }
  undo() { if (this.canUndo) this.at -= 1; }
  redo() { if (this.canRedo) this.at += 1; }

  /** Paints into a copy of the state's mask, which `push` makes a state when the stroke ends. Points are of the sheet. */
  stroke(mask, from, to, radius, value) {
    const { x, y, width, height } = this.state;
    const local = (point) => ({ x: point.x - x, y: point.y - y });
    return paintLine(mask, width, height, local(from), local(to), radius, value);
  }

  /** The nearest place where the frame still holds a quarter of the picture's edge and the sheet does not grow too large. */
  placeFrame({ x, y }) {
    const { side, state } = this;
    const clamp = (value, start, length) => {
      const low = Math.max(start - 0.75 * side, start + length - MAX_SIDE);
      const high = Math.min(start + length - 0.25 * side, start + MAX_SIDE - side);
      return Math.round(Math.min(high, Math.max(low, value)));
    };
    return { x: clamp(x, state.x, state.width), y: clamp(y, state.y, state.height) };
  }

  /** Which pixels of the frame are drawn anew: bytes (side, side), 1 where masked, transparent or off the picture. */
  unknown() {
    const { side, state } = this;
    const view = makeCanvas(side, side).getContext("2d", { willReadFrequently: true });
    view.drawImage(state.canvas, state.x - state.frame.x, state.y - state.frame.y);
    const { data } = view.getImageData(0, 0, side, side);
    const out = new Uint8Array(side * side);
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++) {
        const [sx, sy] = [x + state.frame.x - state.x, y + state.frame.y - state.y];
        const inside = sx >= 0 && sy >= 0 && sx < state.width && sy < state.height;
        const known = inside && !state.mask[sy * state.width + sx] && data[4 * (y * side + x) + 3] >= 128;
        out[y * side + x] = known ? 0 : 1;
      }
    }
    return out;
  }

  /** The frame's picture, opaque, and its mask, transparent where the picture is drawn anew: two PNG blobs. */
  async request() {
    const { side, state } = this;
    const image = makeCanvas(side, side), mask = makeCanvas(side, side);
    const context = image.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, side, side);
    context.drawImage(state.canvas, state.x - state.frame.x, state.y - state.frame.y);
    const pixels = new ImageData(side, side);
    this.unknown().forEach((value, i) => { pixels.data[4 * i + 3] = value ? 0 : 255; });
    mask.getContext("2d").putImageData(pixels, 0, 0);
    return { image: await canvasBlob(image), mask: await canvasBlob(mask) };
  }

  /** Puts a drawn picture into the frame; the sheet grows to hold it, and the frame's mask is cleared. */
  accept(picture, settings) {
    const { side, state } = this;
    const x = Math.min(state.x, state.frame.x), y = Math.min(state.y, state.frame.y);
    const width = Math.max(state.x + state.width, state.frame.x + side) - x;
    const height = Math.max(state.y + state.height, state.frame.y + side) - y;
    const canvas = makeCanvas(width, height);
    const context = canvas.getContext("2d");
    context.drawImage(state.canvas, state.x - x, state.y - y);
    context.drawImage(picture, state.frame.x - x, state.frame.y - y, side, side);
    const mask = new Uint8Array(width * height);
    for (let row = 0; row < state.height; row++) {
      const from = row * state.width;
      mask.set(state.mask.subarray(from, from + state.width), (row + state.y - y) * width + state.x - x);
    }
    for (let row = 0; row < side; row++) {
      const from = (row + state.frame.y - y) * width + state.frame.x - x;
      mask.fill(0, from, from + side);
    }
    const edits = [...state.edits, { ...settings, frame: [state.frame.x, state.frame.y, side] }];
    this.push({ x, y, width, height, canvas, mask, edits });
  }

  /** The whole sheet as a PNG. */
  blob() {
    return canvasBlob(this.state.canvas);
  }
}
