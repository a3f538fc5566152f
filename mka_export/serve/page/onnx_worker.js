// The worker of onnx.js: one model, asked by messages.

import { CACHE, counting } from "./files.js";

let library, model, tokenizer, stopped;
let seen = null; // by the model so far: its key-value cache, and the ids it is of

const TASKS = { load, generate };

self.onmessage = async ({ data }) => {
  if (data.task === "stop") {
    stopped = true;
    return;
  }
  try {
    postMessage({ done: await TASKS[data.task](data) });
  } catch (error) {
    postMessage({ failed: String(error?.message ?? error) });
  }
};

async function load({ id, place, threads, keep }) {
  library = await import(`${place}transformers.js`);
  const { AutoModelForCausalLM, AutoTokenizer, env } = library;
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = "/models/";
  env.useBrowserCache = keep;
  env.cacheKey = CACHE;
  env.useWasmCache = false;
  const runtime = `${self.location.origin}${place}ort-wasm-simd-threaded`;
  env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };
  env.backends.onnx.wasm.numThreads = threads;
  // Its own report of progress would ask for every file twice, to know its size.
  env.fetch = async (file, how) => {
    const response = await fetch(file, how);
    const count = counting((bytes) => postMessage({ news: { file, bytes } }));
    return response.ok ? new Response(response.body.pipeThrough(count), response) : response;
  };
  tokenizer = await AutoTokenizer.from_pretrained(id);
  model = await AutoModelForCausalLM.from_pretrained(id, { device: "wasm" });
  return { chat: Boolean(tokenizer.chat_template) };
}

async function generate({ messages, text, limit, temperature }) {
  const { input_ids } = messages
    ? tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true })
    : tokenizer(text);
  const how = temperature > 0 ? { do_sample: true, temperature, top_k: 40 } : { do_sample: false };
  const ends = new Set([model.generation_config.eos_token_id].flat());
  let all = input_ids;
  let past_key_values = known(all);
  stopped = false;
  const ids = [];
  const made = () => ({ text: tokenizer.decode(ids, { skip_special_tokens: true }), ids, tokens: ids.length });
  // One token at a time: no message comes in while generate() runs, and one may say stop.
  while (ids.length < limit && !stopped) {
    ({ sequences: all, past_key_values } = await model.generate({
      ...how,
      input_ids: all,
      attention_mask: library.ones_like(all),
      ...(past_key_values && { past_key_values }),
      max_new_tokens: 1,
      return_dict_in_generate: true,
    }));
    seen = { past_key_values, ids: all.data };
    const id = Number(all.data.at(-1));
    if (ends.has(id)) {
      break;
    }
    ids.push(id);
    postMessage({ news: made() });
    await letMessagesIn();
  }
  return made();
}

/** Return the key-value cache of what was generated before, if the text goes on from there. */
function known(all) {
  const length = seen?.past_key_values.get_seq_length();
  const goesOn = seen && length < all.data.length && all.data.slice(0, length).every((id, i) => id === seen.ids[i]);
  return goesOn ? seen.past_key_values : null;
}

function letMessagesIn() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port2.onmessage = () => {
      port2.close();
      resolve();
    };
    port1.postMessage(null);
  });
}
