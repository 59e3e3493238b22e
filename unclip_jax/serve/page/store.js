// The history: runs and their pictures, kept in the browser's IndexedDB.
//
// A run is {id, kind, created, settings, pictures: [picture id], title, seconds}. A picture is a PNG blob.
// Where the browser keeps nothing (some private windows), the history lives until the page closes.

const NAME = "unclip", VERSION = 1;

const request = (asked) =>
  new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });

const finished = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onerror = transaction.onabort = () => {
      const full = transaction.error?.name === "QuotaExceededError";
      reject(full ? new Error("The browser has no more room for pictures. Delete a part of the history.") : transaction.error);
    };
  });

/** A new name for a run or a picture; later ones sort after earlier ones. */
let count = 0;
export const newId = () =>
  `${Date.now().toString(36).padStart(9, "0")}-${(count++).toString(36).padStart(3, "0")}-${Math.random().toString(36).slice(2, 8)}`;

/** Opens the history. `kept` says whether it survives a reload. */
export async function openStore() {
  try {
    const asked = indexedDB.open(NAME, VERSION);
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore("runs", { keyPath: "id" });
      asked.result.createObjectStore("pictures", { keyPath: "id" });
    };
    return inDatabase(await request(asked));
  } catch {
    return inMemory();
  }
}

function inDatabase(database) {
  // Another window may want a newer layout; it waits until this one lets go.
  database.onversionchange = () => database.close();
  const read = (store) => database.transaction(store).objectStore(store);
  return {
    kept: true,
    runs: async () => (await request(read("runs").getAll())).reverse(),
    picture: async (id) => (await request(read("pictures").get(id)))?.blob ?? null,
    /** Saves a run with those of its pictures, {id: blob}, that are not there yet; all of it or nothing. */
    async save(run, pictures = {}) {
      const transaction = database.transaction(["runs", "pictures"], "readwrite");
      transaction.objectStore("runs").put(run);
      for (const [id, blob] of Object.entries(pictures)) transaction.objectStore("pictures").put({ id, blob });
      await finished(transaction);
    },
    async remove(run) {
      const transaction = database.transaction(["runs", "pictures"], "readwrite");
      transaction.objectStore("runs").delete(run.id);
      for (const id of run.pictures) transaction.objectStore("pictures").delete(id);
      await finished(transaction);
    },
    async clear() {
      const transaction = database.transaction(["runs", "pictures"], "readwrite");
      transaction.objectStore("runs").clear();
      transaction.objectStore("pictures").clear();
      await finished(transaction);
    },
  };
}

function inMemory() {
  const runs = new Map(), blobs = new Map();
  return {
    kept: false,
    runs: async () => [...runs.values()].reverse(),
    picture: async (id) => blobs.get(id) ?? null,
    async save(run, pictures = {}) {
      runs.set(run.id, run);
      for (const [id, blob] of Object.entries(pictures)) blobs.set(id, blob);
    },
    async remove(run) {
      runs.delete(run.id);
      for (const id of run.pictures) blobs.delete(id);
    },
    async clear() {
      runs.clear();
      blobs.clear();
    },
  };
}
