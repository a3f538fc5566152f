from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mka_export.models import prefixed
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.prefixed import Group, last_states
from mka_export.models.runner import LayerRunner
from mka_export.progress import Progress

GROUPS: list[Group] = [
    (tuple(range(3, 60)), [(5, 9, 11), (7,), tuple(range(80, 120)), (5, 9)]),
    ((), [(4, 4, 4, 4), (9,)]),
    ((8,), [(3, 1)]),
]


@pytest.mark.parametrize("most", [1 << 20, 64 * 4 * 70, 64 * 4 * 4])  # bytes: all at once, some, hardly one text
@pytest.mark.parametrize("model", ["pico_llama", "pico_qwen2"])
def test_states_are_those_of_whole_texts_however_they_are_cut(
    model: str, most: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Path = request.getfixturevalue(model)
    monkeypatch.setattr(prefixed, "STATE_BYTES", most)
    runner = LayerRunner(Checkpoint.open(path))
    found = torch.cat(list(last_states(runner, GROUPS, Progress(quiet=True))))
    texts = [torch.tensor([[*prefix, *rest]]) for prefix, rests in GROUPS for rest in rests]
    expected = torch.stack([runner.hidden_states(ids)[0, -1] for ids in texts])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_what_texts_begin_with_goes_through_once(pico_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, seen = LayerRunner(Checkpoint.open(pico_llama)), []
    run = LayerRunner._run_layer

    def counted(self, index, weights, states, cache=None):  # type: ignore[no-untyped-def]
        seen.append(states.shape[0] * states.shape[1])
        return run(self, index, weights, states, cache)

    monkeypatch.setattr(LayerRunner, "_run_layer", counted)
    list(last_states(runner, GROUPS[:1], Progress(quiet=True)))
    assert sum(seen) == 6 * (57 + 4 * 40)  # layers times: the prefix, and four texts as long as the longest
