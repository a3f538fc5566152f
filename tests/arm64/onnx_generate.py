"""python onnx_generate.py GRAPH PROMPTS TOKENS: greedy continuations by ONNX Runtime alone, as JSON: token ids of each prompt.

It needs numpy and onnxruntime only, so that it runs where nothing else is installed. PROMPTS are lists of token ids, as JSON.
"""

import json
import sys

import numpy as np
import onnxruntime

graph, prompts, tokens = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
empty = {
    each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
    for each in session.get_inputs()
    if each.name.startswith("past_key_values.")
}
outputs = ["logits", *(name.replace("past_key_values", "present") for name in empty)]
found = []
for prompt in json.loads(prompts):
    ids, fed, cache = list(prompt), 0, empty
    while len(ids) < len(prompt) + int(tokens):
        new = np.array([ids[fed:]], dtype=np.int64)
        mask = np.ones((1, len(ids)), dtype=np.int64)
        logits, *present = session.run(outputs, {"input_ids": new, "attention_mask": mask, **cache})
        fed, cache = len(ids), dict(zip(empty, present, strict=True))
        ids.append(int(logits[0, -1].argmax()))
    found.append(ids[len(prompt) :])
print(json.dumps(found))
