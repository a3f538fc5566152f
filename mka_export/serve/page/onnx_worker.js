// The worker of onnx.js: one model, asked by messages.

import { CACHE } from "./files.js";

let model, tokenizer, stopping;

const TASKS = { load, generate };

self.onmessage = async ({ data }) => {
  if (data.task === "stop") {
    stopping?.interrupt();
    return;
  }
  try {
    postMessage({ done: await TASKS[data.task](data) });
  } catch (error) {
    postMessage({ failed: String(error?.message ?? error) });
  }
};

async function load({ id, library, threads, keep }) {
  const { AutoModelForCausalLM, AutoTokenizer, InterruptableStoppingCriteria, env } = await import(
    `${library}transformers.js`
  );
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = "/models/";
  env.useBrowserCache = keep;
  env.cacheKey = CACHE;
  env.useWasmCache = false;
  const place = `${self.location.origin}${library}ort-wasm-simd-threaded`;
  env.backends.onnx.wasm.wasmPaths = { mjs: `${place}.mjs`, wasm: `${place}.wasm` };
  env.backends.onnx.wasm.numThreads = threads;
  const progress_callback = ({ status, file, loaded }) => {
    if (status === "progress") {
      postMessage({ news: { file, loaded } });
    }
  };
  tokenizer = await AutoTokenizer.from_pretrained(id, { progress_callback });
  model = await AutoModelForCausalLM.from_pretrained(id, { device: "wasm", progress_callback });
  stopping = new InterruptableStoppingCriteria();
  return { chat: Boolean(tokenizer.chat_template) };
}

async function generate({ messages, text, limit, temperature }) {
  const inputs = messages
    ? tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true })
    : tokenizer(text);
  const ids = [];
  const ends = new Set(tokenizer.all_special_ids);
  const made = () => ({ text: tokenizer.decode(ids, { skip_special_tokens: true }), ids, tokens: ids.length });
  let prompt = true; // the streamer is given the prompt first
  const streamer = {
    put([tokens]) {
      if (!prompt) {
        ids.push(...tokens.map(Number));
        postMessage({ news: made() });
      }
      prompt = false;
    },
    end() {},
  };
  stopping.reset();
  const how = temperature > 0 ? { do_sample: true, temperature, top_k: 40 } : { do_sample: false };
  await model.generate({ ...inputs, ...how, max_new_tokens: limit, streamer, stopping_criteria: stopping });
  if (ends.has(ids.at(-1))) {
    ids.pop();
  }
  return made();
}
