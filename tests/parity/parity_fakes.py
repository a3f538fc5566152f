"""Runtimes whose probabilities are known, so that every figure can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from mka_export.parity.runtimes import LogProbs, Prefixed, Windows


class FakeRuntime:
    """Gives the same distribution everywhere, or what ``row(window, position)`` says; words are tokens."""

    name = "fake"
    device = "cpu"

    def __init__(
        self, distribution: ArrayLike | Callable[[int, int], ArrayLike], vocab_size: int, vocabulary: Sequence[str] = ()
    ) -> None:
        self.distribution, self.vocab_size, self.vocabulary = distribution, vocab_size, list(vocabulary)

    def tokenize(self, text: str) -> list[int]:
        return [self.vocabulary.index(word) for word in text.split()]

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(self.vocabulary[i] for i in ids)

    def log_probs(self, windows: Windows) -> Iterator[LogProbs]:
        for w, window in enumerate(windows):
            rows = [
                self.distribution(w, t) if callable(self.distribution) else self.distribution
                for t in range(len(window))
            ]
            with np.errstate(divide="ignore"):
                yield np.log(np.asarray(rows, dtype=np.float64)).astype(np.float32)

    def next_log_probs(self, texts: Sequence[Prefixed], tokens: Sequence[int]) -> Iterator[LogProbs]:
        for text in texts:
            rows = [(*text.prefix, *rest) for rest in text.rests]
            last = [next(self.log_probs(np.array([row])))[-1] for row in rows]
            yield np.stack(last)[:, list(tokens)]

    def rest_log_probs(self, texts: Sequence[Prefixed]) -> Iterator[LogProbs]:
        for text in texts:
            for rest in text.rests:
                yield next(self.log_probs(np.array([[*text.prefix, *rest]])))[-len(rest) :]

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        return [[0] * max_new_tokens for _ in prompts]

    def close(self) -> None:
        pass


def random_runtime(seed: int, vocab_size: int = 7) -> FakeRuntime:
    """Give other random distributions at every position, the same on every pass; token 0 is often likely."""
    return FakeRuntime(
        lambda w, t: np.random.default_rng((seed, w, t)).dirichlet(np.r_[4.0, np.ones(vocab_size - 1)]),
        vocab_size=vocab_size,
    )
