// The page: which model, what is asked of it, what it says, and how fast.

import { forgetOthers, openStore } from "./files.js";

const MOST_THREADS = 4; // by default, and half of the cores, as ONNX Runtime has it: the others are slow, or busy
const ENGINES = { gguf: "./gguf.js", onnx: "./onnx.js" };
const by = (id) => document.getElementById(id);
const page = document.body;
const wide = matchMedia("(min-width: 60rem)");

let site, store, engine, stopping, loadSeconds;
let turns = []; // of the conversation, as chat templates take them

async function start() {
  const response = await fetch("artifacts.json");
  site = await response.json();
  store = await openStore();
  if (store) {
    await forgetOthers(store, site.artifacts);
  }
  const most = crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  by("threads").max = most;
  by("threads").value = Math.min(Math.ceil(most / 2), MOST_THREADS);
  by("threads").disabled = most === 1;
  const lacks = [
    !crossOriginIsolated && "No shared memory: one thread.",
    !store && "No store: files are fetched again at each visit.",
    !isSecureContext && "Browsers give neither to a page that came over plain http from another device; see serve --tls.",
  ].filter(Boolean);
  by("notice").textContent = lacks.join(" ");
  by("notice").hidden = lacks.length === 0;
  by("models").append(...site.artifacts.map(card));
  const first = document.querySelector("input[name=model]:enabled");
  if (first) {
    first.checked = true;
  }
  by("load").disabled = !first;
  page.dataset.state = "idle";
}

function card(artifact) {
  const label = document.createElement("label");
  const radio = Object.assign(document.createElement("input"), {
    type: "radio",
    name: "model",
    value: artifact.id,
    disabled: Boolean(artifact.obstacle),
  });
  radio.dataset.name = artifact.name;
  const kind = artifact.kind === "gguf" ? "GGUF" : "ONNX";
  const about = [artifact.target, kind, megabytes(artifact.nbytes)].filter(Boolean).join(" · ");
  const words = element("span", "", element("strong", artifact.name), element("small", about));
  if (artifact.obstacle) {
    words.append(element("small", `Not offered: ${artifact.obstacle}.`));
  }
  label.append(radio, words);
  return label;
}

function element(kind, text, ...children) {
  const made = document.createElement(kind);
  made.textContent = text;
  made.append(...children);
  return made;
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const rounded = (number, digits = 1) => number.toFixed(digits);

async function load(event) {
  event.preventDefault();
  const id = new FormData(by("choice")).get("model");
  const artifact = site.artifacts.find((each) => each.id === id);
  await attempt("loading", engine ? "ready" : "idle", async () => {
    await engine?.close();
    engine = undefined;
    forget();
    by("facts").hidden = true;
    by("loading").hidden = false;
    const report = (step, share) => {
      by("step").textContent = share === null ? `${step} …` : `${step}: ${Math.round(100 * share)} %`;
      if (share === null) {
        by("progress").removeAttribute("value");
      } else {
        by("progress").value = share;
      }
    };
    report("Fetching", 0);
    const began = performance.now();
    const { open } = await import(ENGINES[artifact.kind]);
    engine = await open(artifact, { ...site, threads: Number(by("threads").value), store, report });
    engine.artifact = artifact;
    loadSeconds = (performance.now() - began) / 1000;
    by("runtime").textContent = engine.runtime;
    by("used").textContent = engine.threads;
    by("size").textContent = megabytes(artifact.nbytes);
    by("loaded").textContent = `${rounded(loadSeconds)} s`;
    by("facts").hidden = false;
    by("chosen").textContent = artifact.name;
    by("empty").textContent = engine.chat
      ? "Say something."
      : "This model has no chat template: it continues the text that you write.";
    document.querySelector("input[name=mode][value=chat]").disabled = !engine.chat;
    document.querySelector(`input[name=mode][value=${engine.chat ? "chat" : "text"}]`).checked = true;
    by("panel").open = wide.matches;
    return "ready";
  });
  by("loading").hidden = true;
  if (engine) {
    by("prompt").focus();
  }
}

async function ask(event) {
  event.preventDefault();
  const mode = new FormData(by("ask")).get("mode");
  const prompt = by("prompt").value;
  const [limit, temperature] = [Number(by("limit").value), Number(by("temperature").value)];
  await attempt("busy", "ready", async () => {
    stopping = new AbortController();
    by("empty").hidden = true;
    by("prompt").value = "";
    if (mode === "chat") {
      turns.push({ role: "user", content: prompt });
    }
    const answer = utterance(mode, prompt);
    const request = mode === "chat" ? { messages: turns } : { text: prompt };
    const ids = "ids" in page.dataset; // they cost time in llama.cpp, and are asked for by tests only
    const began = performance.now();
    let first;
    const hear = ({ text, tokens }) => {
      first ??= performance.now();
      answer.show(text);
      answer.tell(`${tokens || ""} tokens …`);
    };
    let made;
    try {
      made = await engine.generate({ ...request, limit, temperature, ids, signal: stopping.signal }, hear);
    } catch (error) {
      turns = mode === "chat" ? turns.slice(0, -1) : turns;
      answer.remove();
      by("prompt").value = prompt;
      throw error;
    }
    const seconds = (performance.now() - (first ?? began)) / 1000;
    const speed = made.tokens > 1 ? (made.tokens - 1) / seconds : null;
    if (mode === "chat") {
      turns.push({ role: "assistant", content: made.text });
    }
    const stopped = stopping.signal.aborted;
    answer.show(made.text);
    answer.tell(
      `${made.tokens} tokens${speed ? `, ${rounded(speed)} tokens/s` : ""}, first after ${rounded(((first ?? performance.now()) - began) / 1000)} s` +
        (stopped ? ", stopped" : ""),
    );
    by("status").textContent = stopped ? "Stopped." : "Done.";
    window.lastRun = {
      ...made,
      mode,
      prompt,
      stopped,
      model: engine.artifact.name,
      kind: engine.artifact.kind,
      runtime: engine.runtime,
      threads: engine.threads,
      loadSeconds,
      firstSeconds: ((first ?? performance.now()) - began) / 1000,
      tokensPerSecond: speed,
    };
    return "ready";
  });
}

/** Do something that may fail: its error becomes one line on the page. */
async function attempt(during, otherwise, work) {
  by("error").hidden = true;
  by("status").textContent = "";
  setState(during);
  try {
    setState(await work());
  } catch (error) {
    by("error").textContent = inOneLine(error);
    by("error").hidden = false;
    setState(engine ? otherwise : "idle");
  }
}

function inOneLine(error) {
  if (error instanceof TypeError && /fetch|network|import|load failed/i.test(error.message)) {
    return "The server does not answer. Is it still running?"; // browsers have no other name for that
  }
  return String(error?.message ?? error).split("\n")[0].slice(0, 300) || "It failed, without a reason.";
}

function setState(state) {
  page.dataset.state = state;
  const busy = state === "busy";
  by("load").disabled = busy || state === "loading";
  by("mode").disabled = state !== "ready";
  by("send").disabled = state !== "ready";
  by("clear").disabled = busy;
  by("send").hidden = busy;
  by("stop").hidden = !busy;
  by("log").setAttribute("aria-busy", busy);
}

/** Show what was written, and return the place of the answer. */
function utterance(mode, prompt) {
  const answer = element("p", "");
  const figures = element("small", "…");
  const asked = element("article", "", element("p", prompt));
  const block = element("article", "", answer, figures);
  asked.className = "asked";
  asked.setAttribute("aria-label", "You");
  block.className = mode;
  block.setAttribute("aria-label", "Model");
  if (mode === "chat") {
    by("log").append(asked);
  }
  by("log").append(block);
  block.scrollIntoView({ block: "end" });
  return {
    show(text) {
      const near = innerHeight + scrollY > document.documentElement.scrollHeight - 160;
      const shown = text.replace(/\uFFFD+$/, ""); // the first bytes of a character
      answer.replaceChildren(...(mode === "text" ? [element("mark", prompt)] : []), shown);
      if (near) {
        block.scrollIntoView({ block: "end" });
      }
    },
    tell: (words) => (figures.textContent = words),
    remove() {
      asked.remove();
      block.remove();
    },
  };
}

function forget() {
  turns = [];
  by("log").replaceChildren();
  by("empty").hidden = false;
}

by("choice").addEventListener("submit", load);
by("ask").addEventListener("submit", ask);
by("stop").addEventListener("click", () => stopping.abort());
by("clear").addEventListener("click", forget);
by("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && matchMedia("(pointer: fine)").matches) {
    event.preventDefault();
    by("send").click();
  }
});
start().catch((error) => {
  by("error").textContent = inOneLine(error);
  by("error").hidden = false;
});
