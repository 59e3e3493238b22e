// Settings inside PNG files: reads and writes the text chunks (PNG specification, section 11.3.3).

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
export const KEYWORD = "unclip"; // the server writes the same chunk

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

/** The CRC-32 that ends every chunk. */
export function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

export const isPng = (bytes) => SIGNATURE.every((value, i) => bytes[i] === value);

/** The chunks of a PNG: [{type, start, end, data}]; bytes that do not form chunks end the list. */
function chunks(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const found = [];
  for (let start = SIGNATURE.length; start + 12 <= bytes.length; ) {
    const end = start + 12 + view.getUint32(start);
    if (end > bytes.length) break;
    const type = String.fromCharCode(...bytes.subarray(start + 4, start + 8));
    found.push({ type, start, end, data: bytes.subarray(start + 8, end - 4) });
    start = end;
  }
  return found;
}

/** The uncompressed texts of a PNG: {keyword: text}. Compressed ones are passed over. */
export function readTexts(bytes) {
  const texts = {};
  if (!isPng(bytes)) return texts;
  for (const { type, data } of chunks(bytes)) {
    if (type !== "tEXt" && type !== "iTXt") continue;
    const nul = data.indexOf(0);
    if (nul < 1) continue;
    const keyword = new TextDecoder("latin1").decode(data.subarray(0, nul));
    if (type === "tEXt") {
      texts[keyword] = new TextDecoder("latin1").decode(data.subarray(nul + 1));
    } else if (data[nul + 1] === 0) {
      // Compression flag and method, then the language and the translated keyword, each ended by a zero.
      const language = data.indexOf(0, nul + 3);
      const translated = data.indexOf(0, language + 1);
      if (language > 0 && translated > 0) texts[keyword] = new TextDecoder().decode(data.subarray(translated + 1));
    }
  }
  return texts;
}

/** The settings that a picture was drawn with, or null if the file says none. */
export function readSettings(bytes) {
  try {
    const settings = JSON.parse(readTexts(bytes)[KEYWORD] ?? "null");
    return settings && typeof settings === "object" && !Array.isArray(settings) ? settings : null;
  } catch {
    return null;
  }
}

/** A copy of the PNG whose iTXt chunk `unclip` holds the settings as JSON, in place of an earlier one. */
export function writeSettings(bytes, settings) {
  if (!isPng(bytes)) throw new TypeError("not a PNG");
  const text = new TextEncoder().encode(`iTXt${KEYWORD}\0\0\0\0\0${JSON.stringify(settings)}`);
  const chunk = new Uint8Array(text.length + 8);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, text.length - 4);
  chunk.set(text, 4);
  view.setUint32(text.length + 4, crc32(text));
  const parts = [bytes.subarray(0, SIGNATURE.length)];
  const prefix = new TextEncoder().encode(`${KEYWORD}\0`);
  for (const { type, start, end, data } of chunks(bytes)) {
    const ours = type === "iTXt" && prefix.every((value, i) => data[i] === value);
    if (!ours) parts.push(bytes.subarray(start, end));
    if (type === "IHDR") parts.push(chunk);
  }
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}
