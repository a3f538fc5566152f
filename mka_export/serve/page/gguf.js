// GGUF files, in llama.cpp compiled to WebAssembly (wllama, which has a worker of its own).

import { fetchBlob } from "./files.js";

const CONTEXT = 2048; // tokens; the key-value cache of that many is allocated at once

/** Load an artifact. Returns what page.js talks to; onnx.js returns the same. */
export async function open(artifact, { library, versions, threads, store, report }) {
  const { Wllama } = await import(`${library}wllama.js`);
  const blob = await fetchBlob(artifact.url, store, (bytes) => report("Fetching", bytes / artifact.nbytes));
  report("Starting llama.cpp", null);
  const said = []; // what llama.cpp complained of
  const note = (...words) => said.push(words.join(" "));
  const wllama = new Wllama(
    { default: `${library}wllama.wasm` },
    // Its own store, which is not used, cannot even be made over plain http.
    { cacheManager: {}, modelManager: {}, logger: { debug() {}, log() {}, warn: note, error: note } },
  );
  // Without this, browsers that need the other build would be sent to a server elsewhere for it.
  wllama.setCompat({ worker: `${library}wllama-compat.js`, wasm: `${library}wllama-compat.wasm` });
  try {
    await wllama.loadModel([blob], { n_ctx: CONTEXT, n_threads: threads, n_parallel: 1, n_gpu_layers: 0, warmup: false });
    if (wllama.getLoadedContextInfo().n_vocab === 0) {
      throw new Error(`llama.cpp cannot load it: ${said[0] ?? "it does not say why"}`); // wllama takes that for success
    }
  } catch (error) {
    await wllama.exit();
    throw error;
  }
  return {
    runtime: `llama.cpp (wllama ${versions.wllama}), wasm, CPU`,
    threads: wllama.getNumThreads(),
    chat: Boolean(wllama.getChatTemplate()),
    generate: (request, hear) => generate(wllama, request, hear),
    close: () => wllama.exit(),
  };
}

async function generate(wllama, { messages, text, limit, temperature, ids, signal }, hear) {
  const made = { text: "", ids: ids ? [] : null, tokens: 0 };
  const onData = ({ choices: [choice], timings }) => {
    const piece = choice?.text ?? choice?.delta?.content ?? "";
    made.text += piece;
    made.ids?.push(...(choice?.logprobs?.content ?? []).map((token) => token.id));
    made.tokens = timings?.predicted_n ?? made.tokens;
    if (piece) {
      hear(made);
    }
  };
  const options = { max_tokens: limit, temperature, timings_per_token: true, stream: true, onData, abortSignal: signal };
  try {
    await (messages
      ? wllama.createChatCompletion({ ...options, messages, ...(ids && { logprobs: true }) })
      : wllama.createCompletion({ ...options, prompt: text, ...(ids && { logprobs: 1 }) }));
  } catch (error) {
    if (/exceeds the available context size/.test(error.message)) {
      throw new Error(`That is too long: conversation and answer have ${CONTEXT} tokens together.`);
    }
    if (error.name !== "AbortError") {
      throw error;
    }
  }
  if (made.ids && wllama.isTokenEOG(made.ids.at(-1))) {
    made.ids.pop();
  }
  return made;
}
