// node generate.mjs FOLDER PROMPTS TOKENS: greedy continuations by transformers.js, as JSON: prompts' ids and all ids.
// FOLDER is opened as it is: file names, number format and external data are found by its config.json alone.
import { dirname, basename, resolve } from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const [folder, prompts, tokens] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder)) + "/";
const name = basename(folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name);
const found = [];
for (const prompt of JSON.parse(prompts)) {
  const inputs = tokenizer(prompt);
  const made = await model.generate({ ...inputs, max_new_tokens: Number(tokens), do_sample: false });
  const plain = (tensor) => tensor.tolist()[0].map(Number);
  found.push({ prompt: plain(inputs.input_ids), all: plain(made) });
}
console.log(JSON.stringify(found));
