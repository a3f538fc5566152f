"""Which layers go: one function for each way to choose.

Each yields one merge after another: the layer at a place of the model under merge takes in those after it. To drop layers
is a merge too, of which only the lowest layer's weights are left; so no way to choose drops the first layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from mka_export.errors import UsageError
from mka_export.merge.measures import MEASURES
from mka_export.merge.steps import Choice
from mka_export.merge.trajectory import Trajectory
from mka_export.merge.views import Views

MASSIVE = 5.0  # times the stream before
COLLAPSED, COLLAPSE_INTERVAL = 4, 2  # LaCo's settings for 32 layers
THRESHOLDS = [0.95 - 0.05 * i for i in range(20)]

Likeness = Callable[[Trajectory, int, int], float]  # of the states at two boundaries


@dataclass(frozen=True)
class Settings:
    """What decides a merge.

    Attributes:
        remove: how many layers go.
        method: a name in ``METHODS``.
        measure: a name in ``MEASURES``, for methods that compare layers by one.
        schedule: ``iterative`` measures again after each merge, ``one-shot`` picks all pairs at once.
        protect: this many early layers take no part.
        alpha: weight of the lower layer in an average; None takes the similarity.
    """

    remove: int
    method: str
    measure: str
    schedule: str
    protect: int
    alpha: float | None

    def weight(self, similarity: float) -> float:
        """Return the weight of the lower layer in an average of two that are so similar."""
        return similarity if self.alpha is None else self.alpha


def similar_pairs(settings: Settings, views: Views) -> Iterator[Choice]:
    """Yield the most similar neighbours (arXiv 2406.16330), iteratively or from one look.

    Raises:
        UsageError: there are not as many pairs as are to be merged.
    """
    left = enough_pairs(settings, views.probe)
    if settings.schedule == "iterative":
        for _ in range(settings.remove):
            similarities = views.similarities.neighbours()
            best = max(allowed_pairs(settings, views.probe), key=similarities.__getitem__)
            yield _pair(settings, best, similarities[best])
    else:
        similarities = views.similarities.neighbours()
        order = sorted(left, key=similarities.__getitem__, reverse=True)
        # Bottom up, so that each merge sees the stream as the merges below it leave it; every one
        # moves the positions above it down by one.
        for done, pair in enumerate(sorted(order[: settings.remove])):
            yield _pair(settings, pair - done, similarities[pair])


def _pair(settings: Settings, position: int, similarity: float) -> Choice:
    return Choice(position, position + 1, similarity, settings.weight(similarity))


def enough_pairs(settings: Settings, probe: Trajectory) -> list[int]:
    """Return the positions whose layer may be merged with the next.

    Raises:
        UsageError: they are fewer than the merges that are to come.
    """
    left = allowed_pairs(settings, probe)
    if settings.remove > len(left):
        raise UsageError(
            f"{settings.remove} layers are to go, but only {len(left)} pairs of neighbours can be merged: the first "
            f"{settings.protect} layers are protected, and {_massive(probe)} write massive activations",
            "Lower --ratio or --protect.",
        )
    return left


def allowed_pairs(settings: Settings, probe: Trajectory) -> list[int]:
    """Return the positions whose layer may be merged with the next."""
    massive, layers = _massive(probe), probe.layers
    return [
        position
        for position in range(settings.protect, len(layers) - 1)
        if not any(layers[position].first <= index <= layers[position + 1].last for index in massive)
    ]


def _massive(probe: Trajectory) -> list[int]:
    """Return the original layers that write massive activations, which every later layer's attention leans on.

    Such a layer multiplies the stream of a few tokens many times over (arXiv 2402.17762; 182 times in layer 11
    of SmolLM2-135M, where no layer after the first three passes 2.1 otherwise). To the other tokens it is a
    layer like any other, so no similarity warns of merging it.
    """
    return [i for i, update in enumerate(probe.largest_updates()) if update > MASSIVE]


def tail(settings: Settings, views: Views) -> Iterator[Choice]:
    """Yield the last layers, all at once."""
    top = len(views.probe.layers) - 1
    yield Choice(top - settings.remove, top)


def least_influence(settings: Settings, views: Views) -> Iterator[Choice]:
    """Yield the layers of the lowest Block Influence, 1 − mean cos(input, output) over all tokens (arXiv 2403.03853)."""
    trajectory = views.everything
    layers = range(_first(settings), len(trajectory.layers))
    likeness = {i: _cosine(trajectory, i, i + 1) for i in layers}
    dropped = sorted(sorted(layers, key=likeness.__getitem__, reverse=True)[: settings.remove])
    for done, layer in enumerate(dropped):
        yield Choice(layer - done - 1, layer - done, likeness[layer])


def closest_block(settings: Settings, views: Views) -> Iterator[Choice]:
    """Yield the block whose input and output are closest in angle at the windows' last tokens (arXiv 2403.17887)."""
    yield _block(settings, views.everything, _angular)


def alike_block(settings: Settings, views: Views) -> Iterator[Choice]:
    """Yield the block whose input and output have the highest cosine over all tokens (arXiv 2505.02819)."""
    yield _block(settings, views.everything, _cosine)


def least_loss(settings: Settings, views: Views) -> Iterator[Choice]:
    """Yield, one after another, the layer without which the model predicts the probe best (SLEB, arXiv 2402.09025)."""
    probe = views.probe
    for _ in range(settings.remove):
        places = range(_first(settings), len(probe.layers))
        losses = {place: _loss(probe, probe.outcome(place, probe.above(place))) for place in places}
        best = min(places, key=losses.__getitem__)
        yield Choice(best - 1, best, -losses[best])


def collapsible(settings: Settings, views: Views) -> Iterator[Choice]:
    """Yield runs of layers that collapse into their lowest without turning the final states away (LaCo, arXiv 2402.11187).

    From the top down, up to ``COLLAPSED`` layers at a time become one where the cosine of the final states with the
    original's stays above a threshold. The paper sets the threshold by hand for each model; here it is the highest, in
    steps of 0.05, at which enough layers go.

    Raises:
        UsageError: there is none.
    """
    likenesses: dict[tuple[tuple[int, int], ...], float] = {}
    for threshold in THRESHOLDS:
        found = _collapses(settings, views.probe, threshold, likenesses)
        if sum(choice.last - choice.position for choice in found) == settings.remove:
            yield from found
            return
    raise UsageError(
        f"laco finds no {settings.remove} layers to remove: whatever collapses, the final states turn away",
        "Lower --ratio, or choose another --method.",
    )


def _collapses(
    settings: Settings, probe: Trajectory, threshold: float, likenesses: dict[tuple[tuple[int, int], ...], float]
) -> list[Choice]:
    """Return what collapses at a threshold, until enough layers are gone.

    Args:
        likenesses: places of the runs that collapse -> what was found to come of it, for other thresholds too.
    """
    layers = [Counter({i: 1.0}) for i in range(len(probe.layers))]  # each a sum of original layers, so many times each
    original = probe.outcome(len(layers), ())
    found: list[Choice] = []
    left, place = settings.remove, len(layers) - COLLAPSED
    while left and place >= settings.protect:
        last = min(place + COLLAPSED - 1, len(layers) - 1, place + left)
        run = Counter({i: (place + 1 - last) * times for i, times in layers[place].items()})
        for layer in layers[place + 1 : last + 1]:
            run.update(layer)
        tried = [run, *layers[last + 1 :]]
        runs = (*((choice.position, choice.last) for choice in found), (place, last))
        if runs not in likenesses:
            outcome = probe.outcome(place, [(min(layer), partial(_sum, probe, layer)) for layer in tried])
            likenesses[runs] = float(functional.cosine_similarity(outcome, original, dim=-1).mean())
        if (likeness := likenesses[runs]) > threshold:
            layers[place:] = tried
            found.append(Choice(place, last, likeness))
            left -= last - place
            place = min(place - COLLAPSE_INTERVAL, len(layers) - COLLAPSED)
        else:
            place -= 1
    return found


def _sum(probe: Trajectory, layer: Mapping[int, float]) -> dict[str, Tensor]:
    """Return a sum of original layers, each so many times."""
    total: dict[str, Tensor] = {}
    for index, times in layer.items():
        for name, tensor in probe.runner.weights(index).items():
            total[name] = total[name].add_(tensor, alpha=times) if name in total else tensor.mul_(times)
    return total


def _first(settings: Settings) -> int:
    """Return the first layer that may be dropped: the one below it takes part."""
    return settings.protect + 1


def _block(settings: Settings, trajectory: Trajectory, likeness: Likeness) -> Choice:
    starts = range(_first(settings), len(trajectory.layers) - settings.remove + 1)
    found = {start: likeness(trajectory, start, start + settings.remove) for start in starts}
    best = max(starts, key=found.__getitem__)
    return Choice(best - 1, best + settings.remove - 1, found[best])


def _cosine(trajectory: Trajectory, one: int, other: int) -> float:
    """Return the mean cosine of the states at two boundaries."""
    total = 0.0
    for batch in trajectory.batches():
        before, after = trajectory.before(one, batch), trajectory.before(other, batch)
        total += float(functional.cosine_similarity(before, after, dim=-1).sum(dtype=torch.float64))
    return total / trajectory.ids.numel()


def _angular(trajectory: Trajectory, one: int, other: int) -> float:
    """Return 1 − angle / π between the states of the windows' last tokens at two boundaries."""
    windows, tokens = trajectory.ids.shape
    last = torch.stack([torch.arange(windows), torch.full((windows,), tokens - 1)])
    measure = MEASURES["angular"]
    before, after = (
        measure.keep(trajectory.nodes_after(boundary - 1, last).double().numpy()) for boundary in (one, other)
    )
    return measure.compare(before, after)


def _loss(trajectory: Trajectory, states: Tensor) -> float:
    """Return the mean loss of the next token, in nats, that final states (N, T, hidden) give."""
    losses = [
        functional.cross_entropy(trajectory.runner.logits(window[:-1]), ids[1:].to(window.device))
        for window, ids in zip(states, trajectory.ids, strict=True)
    ]
    return float(torch.stack(losses).mean())
