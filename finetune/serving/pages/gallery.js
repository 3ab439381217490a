// Images drawn, kept in this browser. IndexedDB, because it holds files of any size and outlives the tab; the other
// stores of a browser hold some 5 MB of text.

const MOST = 300;
const STORE = "images";
let database;

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function store(mode) {
  if (!database) {
    const opening = indexedDB.open("finetune", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    database = await settled(opening);
  }
  return database.transaction(STORE, mode).objectStore(STORE);
}

export async function all() {
  return (await settled((await store("readonly")).getAll())).reverse();
}

// The item with its id. Of too many, the oldest go.
export async function keep(item) {
  const place = await store("readwrite");
  item.id = await settled(place.add(item));
  const ids = await settled(place.getAllKeys());
  for (const id of ids.slice(0, -MOST)) place.delete(id);
  return item;
}

export async function remove(id) {
  return settled((await store("readwrite")).delete(id));
}

export async function clear() {
  return settled((await store("readwrite")).clear());
}
