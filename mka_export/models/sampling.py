"""Text sampled from a model: what it looks at where there is no data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from mka_export.models.outline import Outline
from mka_export.models.whole import load_whole
from mka_export.progress import Progress, Task

BATCH = 32  # windows sampled together
SEED = 2406_16330


def sampling_bytes(model: Outline, tokens: int) -> int:
    """Return the memory of ``sample_windows``: the whole model in float32, and the keys and values of a batch."""
    cache = 2 * BATCH * tokens * model.hidden_size * model.num_layers  # at most: with as many key heads as heads
    return 4 * (model.parameters + cache)


def sample_windows(
    path: Path,
    leading: int | None,
    first: Sequence[int],
    count: int,
    tokens: int,
    device: torch.device,
    progress: Progress,
) -> Tensor:
    """Sample windows from a checkpoint's own distribution, at temperature 1, each from one token drawn at random.

    What a model says of itself is close to what it was trained on (arXiv 2410.17170 compares such calibration text with
    real one); the random token (arXiv 2305.17888) keeps a chat model from chatting in every window. An end of text does
    not stop a window: the next text follows.

    Args:
        path: the checkpoint's folder; the whole model is held in memory, in float32.
        leading: the id that every text begins with, if one does.
        first: the ids among which the token after it is drawn.
        count: windows.
        tokens: in each.

    Returns:
        ids (count, tokens) int64, the same for the same model, device and number of threads.
    """
    model = load_whole(path, device)
    settings: Any = GenerationConfig
    model.generation_config = settings()  # the model's own may name ends of text, penalties, a top-k
    sampled = settings(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=tokens, pad_token_id=0)
    choices = torch.tensor(first)
    windows, batches = [], -(-count // BATCH)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        with progress.task("sampling text from the model", batches * BATCH * tokens) as task:
            for _ in range(batches):  # whole ones: more windows begin with the same
                ids = choices[torch.randint(len(choices), (BATCH, 1))]
                if leading is not None:
                    ids = functional.pad(ids, (1, 0), value=leading)
                advance = StoppingCriteriaList([_Watcher(task)])
                made = model.generate(ids.to(device), generation_config=sampled, stopping_criteria=advance)
                windows.append(made.cpu())
    return torch.cat(windows)[:count]


class _Watcher(StoppingCriteria):
    """Tells a task of every token; never stops."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Say that each row has one token more."""
        self._task.advance(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
