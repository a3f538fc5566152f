"""python gguf_generate.py FILE PROMPTS TOKENS: greedy continuations by llama.cpp, as JSON: token ids of each prompt.

It needs llama_cpp only. PROMPTS are lists of token ids, as JSON.
"""

import json
import sys

from llama_cpp import Llama

path, prompts, tokens = sys.argv[1:]
model = Llama(path, n_threads=1, n_threads_batch=1, verbose=False)
found = []
for prompt in json.loads(prompts):
    model.reset()
    made = model.generate(prompt, temp=0.0)
    found.append([next(made) for _ in range(int(tokens))])
print(json.dumps(found))
