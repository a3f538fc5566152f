// node tokenize.mjs FOLDER TEXTS: the ids that transformers.js makes of them, as JSON.
import { dirname, basename, resolve } from "node:path";
import { AutoTokenizer, env } from "@huggingface/transformers";

const [folder, texts] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder)) + "/";
const tokenizer = await AutoTokenizer.from_pretrained(basename(folder));
console.log(JSON.stringify(JSON.parse(texts).map((text) => tokenizer.encode(text, { add_special_tokens: false }))));
