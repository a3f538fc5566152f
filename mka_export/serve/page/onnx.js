// ONNX folders, in transformers.js and ONNX Runtime, in a worker so that the page stays responsive.

/** Load an artifact. Returns what page.js talks to; gguf.js returns the same. */
export async function open(artifact, { library, versions, threads, store, report }) {
  const worker = new Worker("onnx_worker.js", { type: "module" });
  const call = caller(worker);
  const parts = new Map();
  const onProgress = ({ file, bytes }) => {
    parts.set(file, bytes);
    const share = [...parts.values()].reduce((sum, each) => sum + each, 0) / artifact.nbytes;
    report(share < 0.999 ? "Fetching" : "Starting ONNX Runtime", share < 0.999 ? share : null);
  };
  try {
    const task = { task: "load", id: artifact.id, place: library, threads, keep: Boolean(store) };
    const { chat } = await call(task, onProgress);
    return {
      runtime: `ONNX Runtime ${versions["onnxruntime-web"].split("-")[0]} (transformers.js ${versions["transformers.js"]}), wasm, CPU`,
      threads,
      chat,
      generate: ({ messages, text, limit, temperature, signal }, hear) => {
        signal.addEventListener("abort", () => worker.postMessage({ task: "stop" }));
        return call({ task: "generate", messages, text, limit, temperature }, hear);
      },
      close: () => worker.terminate(),
    };
  } catch (error) {
    worker.terminate();
    throw error;
  }
}

/** Return `call(message, hear)`: what the worker finally answers, after `hear` has heard the news on the way. */
function caller(worker) {
  return (message, hear) =>
    new Promise((resolve, reject) => {
      worker.onmessage = ({ data: { news, done, failed } }) => {
        if (news) {
          hear(news);
        } else if (failed) {
          reject(new Error(failed));
        } else {
          resolve(done);
        }
      };
      worker.onerror = (event) => reject(new Error(event.message || "the worker could not start"));
      worker.postMessage(message);
    });
}
