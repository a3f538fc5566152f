"""What runtimes say about the same tokens: likelihood of each, divergence and agreement between them."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mka_export.errors import MkaError, RuntimeFailure
from mka_export.parity.runtimes import LogProbs, Runtime, Windows
from mka_export.progress import Progress

Values = NDArray[np.float64]  # (windows, positions): one a predicted token
ARTIFACT = "artifact"
ROWS = 32  # positions worked on at a time: temporary arrays of 20 MB at a vocabulary of 152 000


@dataclass(frozen=True)
class Divergence:
    """How the artifact's next-token distribution differs from a reference's.

    Attributes:
        kl: KL(reference ‖ artifact) in nats.
        same_top: 1 where both give the same token the highest probability, else 0.
    """

    kl: Values
    same_top: Values


@dataclass(frozen=True)
class Scores:
    """All that is kept of the log-probabilities.

    Attributes:
        nll: runtime's name -> negative log-likelihood of each token but a window's first, in nats.
        divergence: reference's name -> the artifact's divergence from it.
        seconds: that the artifact's runtime took for all windows; no part of what is compared.
    """

    nll: Mapping[str, Values]
    divergence: Mapping[str, Divergence]
    seconds: float = field(default=0.0, compare=False)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` with ``nll/STEP``, ``kl/STEP`` (float32: what they are made of is no finer) and ``top/STEP``."""
        arrays: dict[str, NDArray[Any]] = {f"nll/{name}": nll.astype(np.float32) for name, nll in self.nll.items()}
        for name, divergence in self.divergence.items():
            arrays[f"kl/{name}"] = divergence.kl.astype(np.float32)
            arrays[f"top/{name}"] = divergence.same_top.astype(np.bool_)
        np.savez(path, **arrays)  # type: ignore[arg-type]  # it takes the names for its own options

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what ``save`` wrote.

        Raises:
            MkaError: it is no such file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name].astype(np.float64) for name in file.files}
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise MkaError(f"{path} holds no scores: {error}", "Measure again.") from error
        groups: dict[str, dict[str, Values]] = {kind: {} for kind in ("nll", "kl", "top")}
        for name, array in arrays.items():
            kind, _, step = name.partition("/")
            groups.setdefault(kind, {})[step] = array
        divergence = {name: Divergence(kl, groups["top"][name]) for name, kl in groups["kl"].items()}
        return cls(groups["nll"], divergence)

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Return the scores of all windows, of which each part has every so-many-th, the first part the first."""
        first = parts[0]
        nll = {name: _woven([part.nll[name] for part in parts]) for name in first.nll}
        divergence = {
            name: Divergence(
                _woven([part.divergence[name].kl for part in parts]),
                _woven([part.divergence[name].same_top for part in parts]),
            )
            for name in first.divergence
        }
        return cls(nll, divergence)


def _woven(parts: Sequence[Values]) -> Values:
    rows: Values = np.empty((sum(map(len, parts)), *parts[0].shape[1:]))
    for start, part in enumerate(parts):
        rows[start :: len(parts)] = part
    return rows


def score(
    windows: Windows, artifact: Runtime, references: Mapping[str, Runtime], progress: Progress | None = None
) -> Scores:
    """Run artifact and references over ``windows`` together, once, and score every predicted token.

    One window of each runtime is in memory at a time. Where one vocabulary has rows that another lacks
    (padding), all are compared on the ids that all have, renormalised.

    Args:
        windows: (windows, tokens) ids; a window predicts its tokens from the second on.
        artifact: the runtime that is judged.
        references: name -> runtime it is compared with.
        progress: where the passes are shown.

    Raises:
        RuntimeFailure: a runtime fails, or lacks a token of the text.
    """
    runtimes = {**references, ARTIFACT: artifact}
    columns = min(runtime.vocab_size for runtime in runtimes.values())
    if windows.max() >= columns:
        smallest = min(runtimes, key=lambda name: runtimes[name].vocab_size)
        raise RuntimeFailure(f"the {smallest} has {columns} tokens; the text uses id {windows.max()}")
    shape = windows.shape[0], windows.shape[1] - 1
    nll = {name: np.empty(shape) for name in runtimes}
    divergence = {name: Divergence(np.empty(shape), np.empty(shape)) for name in references}
    progress = progress or Progress(quiet=True)
    # The torch runtime passes through its layers, with a bar of its own, when the iterators are made.
    clock = Clock()
    *streams, last = (runtime.log_probs(windows) for runtime in runtimes.values())
    streams.append(clock.timed(last))
    with progress.task("comparing next-token probabilities", len(windows)) as task:
        for w, window in enumerate(zip(*streams, strict=True)):
            for start in range(0, shape[1], ROWS):
                rows = slice(start, min(start + ROWS, shape[1]))
                targets = windows[w, 1:][rows]
                part = {
                    name: _shared(log_probs[rows], columns) for name, log_probs in zip(runtimes, window, strict=True)
                }
                for name, log_probs in part.items():
                    nll[name][w, rows] = -log_probs[np.arange(len(targets)), targets]
                for name in references:
                    divergence[name].kl[w, rows] = kl_divergence(part[name], part[ARTIFACT])
                    same = part[name].argmax(axis=1) == part[ARTIFACT].argmax(axis=1)
                    divergence[name].same_top[w, rows] = same
            task.advance()
    return Scores(nll, divergence, clock.seconds)


class Clock:
    """The seconds that a block takes, or an iterator among others.

    Attributes:
        seconds: so far.
    """

    seconds = 0.0

    def __enter__(self) -> Clock:
        self._start = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += time.monotonic() - self._start

    def timed(self, stream: Iterator[LogProbs]) -> Iterator[LogProbs]:
        """Yield what ``stream`` does, and count the time until it has each."""
        while True:
            with self:
                found = next(stream, None)
            if found is None:
                return
            yield found


def kl_divergence(reference: LogProbs, artifact: LogProbs) -> Values:
    """Return KL(reference ‖ artifact) of each row of two (rows, vocabulary) log-probabilities, in nats.

    A token that the reference rules out adds nothing; one that only the artifact rules out makes it infinite.
    """
    p = np.exp(reference)
    with np.errstate(invalid="ignore"):
        gap = reference - artifact
    terms = np.multiply(p, gap, out=np.zeros_like(p), where=p != 0)
    total: Values = terms.sum(axis=1, dtype=np.float64)
    return np.maximum(total, 0.0)  # rounding can leave -1e-9 where the two are equal; NaN stays NaN


def _shared(log_probs: LogProbs, columns: int) -> LogProbs:
    if log_probs.shape[1] == columns:
        return log_probs
    kept = log_probs[:, :columns]
    mass = np.exp(kept).sum(axis=1, keepdims=True, dtype=np.float64)
    shared: LogProbs = kept - np.log(mass).astype(np.float32)
    return shared
