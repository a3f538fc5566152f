"""What a model in its runtime answers: the log-probabilities of the four letters after each question."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mka_export.parity.mmlu.prompts import Sheet
from mka_export.parity.runtimes import Runtime
from mka_export.progress import Progress
from mka_export.publish import save_array, seal, sealed

SUBJECTS = 8  # whose answers are kept together: what is lost when the work is killed

LogLetters = NDArray[np.float32]  # (questions, 4): natural log-probabilities of A, B, C and D


def ask(runtime: Runtime, sheet: Sheet, pieces: Path, progress: Progress) -> LogLetters:
    """Ask a model all questions of ``sheet``.

    As in lm-evaluation-harness, its answer is the letter with the highest probability of the four.

    Args:
        pieces: a folder where finished answers are kept, to go on from when the work was killed.

    Raises:
        RuntimeFailure: the runtime cannot run the model, or lacks a token of the questions.
    """
    return np.concatenate(list(_pieces(runtime, sheet, pieces, progress)))


def _pieces(runtime: Runtime, sheet: Sheet, pieces: Path, progress: Progress) -> Iterator[LogLetters]:
    groups = sheet.groups()
    with progress.task("asking questions", len(sheet.prompts)) as task:
        for start in range(0, len(groups), SUBJECTS):
            piece, part = pieces / f"answers-{start}.npy", groups[start : start + SUBJECTS]
            if sealed(piece) is None:
                found = []
                for answers in runtime.next_log_probs(part, sheet.letters):
                    found.append(answers)
                    task.advance(len(answers))
                save_array(piece, np.concatenate(found))
                seal(piece, {})
            else:
                task.advance(sum(len(group.rests) for group in part))
            yield np.load(piece)
