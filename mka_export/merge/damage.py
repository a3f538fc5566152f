"""Which layers ``mka`` merges: a similarity guides, and the damage that a merge does on trial decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from mka_export.data import load_json, value_of
from mka_export.merge.choose import Settings, allowed_pairs, enough_pairs, similar_pairs
from mka_export.merge.fuse import Fuse, Fused
from mka_export.merge.steps import Choice, Step, merge_spans, step_from
from mka_export.merge.trajectory import Trajectory
from mka_export.merge.views import Views
from mka_export.models.checkpoint_writer import save_tensors
from mka_export.publish import write_atomically

SCREENED = 8  # of the most similar pairs, whose damage is measured
WORST = 1e9  # damage of a merge that makes NaN or infinity


def least_damage(fuse: Fuse, settings: Settings, views: Views) -> Iterator[Choice]:
    """Yield, bottom up, the layers whose merges turn the model least away from the original.

    A similarity guides and does not decide: of the ``SCREENED`` most similar pairs of neighbours each is fused on trial,
    once with the attention of the lower and once with that of the upper, fitted to a few windows, and the model with it
    run over what others begin with, said twice. Its damage is by how much the divergence of the predictions there from
    the original's, KL(original ‖ model), grows. The least is merged, on these windows only, and all is measured again;
    what was measured of a pair before counts as long as neither layer changes. On the one-shot schedule the similarity
    decides alone, and the lowest layer keeps its attention.

    When all are chosen, each layer that is to be made of several is yielded once, from the lowest to the highest, so that
    every fit to all windows sees the stream that the merges below it leave, and no layer is run over all of them twice.

    Args:
        fuse: how layers become one.

    Raises:
        UsageError: there are not as many pairs as are to be merged.
    """
    if settings.schedule == "iterative":
        enough_pairs(settings, views.probe)
        chosen = _chosen(fuse, settings, views)
    else:
        chosen = [*_steps(similar_pairs(settings, views), len(views.probe.layers))]
    yield from _bottom_up(chosen, len(views.probe.layers))


def _steps(pairs: Iterable[Choice], layers: int) -> Iterator[Step]:
    """Yield the merges of pairs, one after another, by the original layers that take part."""
    spans = [[i, i] for i in range(layers)]
    for pair in pairs:
        yield pair.step(spans, attention=spans[pair.position][0])
        merge_spans(spans, pair)


def _chosen(fuse: Fuse, settings: Settings, views: Views) -> list[Step]:
    """Return the merges in the order in which they are chosen."""
    probe, notes, predictions = views.probe, _Notes(views.notes), _Predictions(views.echo)
    if len(notes.chosen) < settings.remove:
        for number in range(settings.remove):
            file, fused = views.trial.folder / f"chosen-{number}.safetensors", None
            if number == len(notes.chosen):
                step, fused = _least_damaged(fuse, settings, views, predictions, notes, file)
                notes.choose(step)
            step = notes.chosen[number]
            choice = step.choice(probe.spans)
            if step != fused:
                save_tensors(fuse(views.trial, choice)[0], file)
            views.replace_on_trial(choice, file)
        views.reset()
        for file in views.trial.folder.glob("chosen-*"):
            file.unlink()
    return notes.chosen[: settings.remove]


def _least_damaged(
    fuse: Fuse, settings: Settings, views: Views, predictions: _Predictions, notes: _Notes, file: Path
) -> tuple[Step, Step | None]:
    """Return the merge, of the most similar pairs, that does least damage, and that whose layer is in ``file`` now."""
    echo, similarities = views.echo, views.similarities.neighbours()
    order = sorted(allowed_pairs(settings, views.probe), key=similarities.__getitem__, reverse=True)
    steps = [step for place in order[:SCREENED] for step in _ways(settings, views, place, similarities[place])]
    new = [step for step in steps if not notes.knows(step)]
    least = min((notes.damage(step) for step in steps if notes.knows(step)), default=math.inf)
    now, written = predictions.divergence(echo.outcome(len(echo.layers), ())) if new else 0.0, None
    for step in new:
        choice = step.choice(echo.spans)
        fused, _ = fuse(views.trial, choice)
        damage = predictions.divergence(_with(fused, echo, choice)) - now
        notes.measure(step, damage)
        if damage < least:
            least, written = damage, step
            save_tensors(fused, file)
    return min(steps, key=notes.damage), written


def _with(fused: Fused, echo: Trajectory, choice: Choice) -> Tensor:
    """Return the final states if ``fused`` stood for the layers of ``choice``."""
    merged = (echo.attention(choice), lambda: fused)
    return echo.outcome(choice.position, chain([merged], echo.above(choice.last)))


def _ways(settings: Settings, views: Views, place: int, similarity: float) -> list[Step]:
    """Return the merges of the layer at ``place`` with the next: with the attention of either."""
    lower, upper = views.probe.layers[place : place + 2]
    weight = settings.weight(similarity)
    return [Step(lower.span, upper.span, similarity, weight, each.attention) for each in (lower, upper)]


def _bottom_up(steps: Sequence[Step], layers: int) -> Iterator[Choice]:
    """Yield one merge for each layer that is to be made of several, from the lowest to the highest.

    What spoke for it is what spoke for the least similar that it joins.
    """
    spans = [[i, i] for i in range(layers)]
    made: dict[int, Step] = {}  # lowest layer of a span -> the merge that made it last
    for step in steps:
        merge_spans(spans, step.choice(spans))
        joined = [step, *(made.pop(lowest) for lowest in (step.lower[0], step.upper[0]) if lowest in made)]
        least = min(joined, key=lambda each: each.similarity or 0.0)
        made[step.lower[0]] = replace(step, similarity=least.similarity, alpha=least.alpha)
    for position, (first, last) in enumerate(spans):
        if first in made:
            merge = made[first]
            yield Choice(position, position + last - first, merge.similarity, merge.alpha, merge.attention)


class _Notes:
    """What was measured and chosen, on disk as soon as it is known: an interrupted choice goes on there.

    Attributes:
        chosen: the merges, in the order in which they were chosen.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            found = load_json(file)
            self._damages = {pair: value_of(found["damages"], pair, float) for pair in value_of(found, "damages", dict)}
            self.chosen = [step_from(step) for step in value_of(found, "chosen", list)]
        except (OSError, ValueError):
            self._damages, self.chosen = {}, []

    def knows(self, step: Step) -> bool:
        """Whether the damage of a merge was measured."""
        return _key(step) in self._damages

    def damage(self, step: Step) -> float:
        """Return the damage of a merge, which was measured."""
        return self._damages[_key(step)]

    def measure(self, step: Step, damage: float) -> None:
        """Note what a merge would do."""
        self._damages[_key(step)] = damage
        self._write()

    def choose(self, step: Step) -> None:
        """Note that a merge is the next."""
        self.chosen.append(step)
        self._write()

    def _write(self) -> None:
        write_atomically(self._file, {"damages": self._damages, "chosen": [asdict(step) for step in self.chosen]})


def _key(step: Step) -> str:
    return f"{step.lower}+{step.upper}, attention of {step.attention}"


class _Predictions:
    """What the original predicts after each token of some windows."""

    def __init__(self, echo: Trajectory) -> None:
        self._echo = echo

    @cached_property
    def _original(self) -> list[Tensor]:
        """Log-probabilities of each window: (tokens, vocabulary)."""
        echo, top = self._echo, self._echo.runner.checkpoint.num_layers
        return [self._predict(window) for batch in echo.batches() for window in echo.original(top, batch)]

    def _predict(self, states: Tensor) -> Tensor:
        return self._echo.runner.logits(states).log_softmax(dim=-1)

    def divergence(self, states: Tensor) -> float:
        """Return the mean KL(original ‖ model) of the next token, in nats, that final states (N, T, hidden) give."""
        total = 0.0
        for original, mine in zip(self._original, states, strict=True):
            total += float(functional.kl_div(self._predict(mine), original, reduction="batchmean", log_target=True))
        return total / len(states) if math.isfinite(total) else WORST
