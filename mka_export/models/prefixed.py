"""Texts that begin alike, through all layers: what they share goes through once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mka_export.models.outline import Outline
from mka_export.models.runner import BATCH_TOKENS, LayerRunner, layer_pass_bytes
from mka_export.progress import Progress

STATE_BYTES = 1 << 30  # of states in memory at a time; a layer's weights are read once for as many texts

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # what the texts begin with, and how each goes on


def last_states(runner: LayerRunner, groups: Sequence[Group], progress: Progress) -> Iterator[Tensor]:
    """Yield what ``rest_states`` does of each text's last token: (texts, hidden), some texts at a time."""
    for texts in rest_states(runner, groups, progress):
        yield torch.stack([states[-1] for states in texts])


def rest_states(runner: LayerRunner, groups: Sequence[Group], progress: Progress) -> Iterator[list[Tensor]]:
    """Yield the states after the last layer, behind what the texts begin with: in order, (T, hidden) each, some at a time.

    A group that is too large for memory is cut, and what its texts begin with goes through once for each part. How the
    texts of a group go on is padded on the right, to the longest of a batch of similar lengths: a causal model does not
    see it.
    """
    for parts in _as_memory_allows(groups, STATE_BYTES // (4 * runner.checkpoint.hidden_size)):
        yield from _run(runner, parts, progress)


def pass_bytes(model: Outline) -> int:
    """Return the memory that ``rest_states`` takes at most, but for a prefix of more than ``BATCH_TOKENS`` tokens."""
    return STATE_BYTES + layer_pass_bytes(model)


def _as_memory_allows(groups: Sequence[Group], most: int) -> Iterator[list[Group]]:
    """Cut groups into parts, and yield as many at a time as have ``most`` tokens together; no part has fewer than a text."""
    parts: list[Group] = []
    tokens = 0
    for prefix, rests in groups:
        own: list[Sequence[int]] = []
        for rest in rests:
            wanted = len(rest) + (0 if own else len(prefix))
            if tokens and tokens + wanted > most:
                yield [*parts, (prefix, own)] if own else parts
                parts, own, tokens, wanted = [], [], 0, len(prefix) + len(rest)
            own.append(rest)
            tokens += wanted
        parts.append((prefix, own))
    yield parts


class _States:
    """The states of one group, from the embedding on."""

    def __init__(self, runner: LayerRunner, prefix: Sequence[int], rests: Sequence[Sequence[int]]) -> None:
        self._runner, self._lengths = runner, [len(rest) for rest in rests]
        self._prefix = runner.embed(torch.tensor([prefix])) if prefix else None
        self._batches = []  # indices of texts, and their states (batch, T, hidden)
        order = sorted(range(len(rests)), key=lambda i: len(rests[i]))
        while order:
            longest = len(rests[order[-1]])
            count = max(1, BATCH_TOKENS // longest)
            batch, order = order[-count:], order[:-count]
            ids = torch.tensor([[*rests[i], *[0] * (longest - len(rests[i]))] for i in batch])
            self._batches.append((batch, runner.embed(ids)))

    def pass_through(self, index: int, weights: dict[str, Tensor]) -> None:
        runner = self._runner
        if self._prefix is None:
            after = [(batch, runner.run_layer(index, weights, states)) for batch, states in self._batches]
        else:
            self._prefix, cache = runner.run_prefix(index, weights, self._prefix)
            after = [(batch, runner.run_rests(index, weights, states, cache)) for batch, states in self._batches]
        self._batches = after

    def rests(self) -> list[Tensor]:
        found = {i: row for batch, states in self._batches for row, i in zip(states, batch, strict=True)}
        return [found[i][:length] for i, length in enumerate(self._lengths)]


def _run(runner: LayerRunner, groups: Sequence[Group], progress: Progress) -> list[list[Tensor]]:
    states = [_States(runner, *group) for group in groups]
    layers = runner.checkpoint.num_layers
    with progress.task(f"{runner.name}, layer by layer", layers * len(states)) as task:
        for index in range(layers):
            weights = runner.weights(index)
            for each in states:
                each.pass_through(index, weights)
                task.advance()
    return [each.rests() for each in states]
