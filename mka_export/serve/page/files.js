// Files of models: fetched with progress, and kept for the next visit where the browser allows it.

export const CACHE = "mka-export";

/** Open the store of files, or return null: over plain http from another device browsers have none. */
export async function openStore() {
  try {
    return await caches.open(CACHE);
  } catch {
    return null;
  }
}

/** Forget the files of models that are no longer served. */
export async function forgetOthers(store, artifacts) {
  for (const { url } of await store.keys()) {
    const path = new URL(url).pathname;
    if (!artifacts.some((artifact) => path.startsWith(artifact.url))) {
      await store.delete(url);
    }
  }
}

/** Return a file as a Blob; `report(bytes)` hears how much has come. */
export async function fetchBlob(url, store, report) {
  const kept = await store?.match(url);
  if (kept) {
    return kept.blob();
  }
  const fetched = async () => {
    const response = await fetch(url);
    if (!response.ok) {
      throw new Error(`the server no longer has ${decodeURIComponent(url.split("/").pop())}: start it again`);
    }
    return new Response(response.body.pipeThrough(counting(report)));
  };
  if (store) {
    try {
      await store.put(url, await fetched());
      return await (await store.match(url)).blob();
    } catch {
      // It is full, or may not be written: browsers have several names for that.
    }
  }
  return (await fetched()).blob();
}

/** Let bytes through, and report how many they are so far. */
export function counting(report) {
  let bytes = 0;
  return new TransformStream({
    transform(chunk, controller) {
      bytes += chunk.byteLength;
      report(bytes);
      controller.enqueue(chunk);
    },
  });
}
