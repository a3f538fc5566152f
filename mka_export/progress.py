"""Progress of long work, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from mka_export.errors import printable


class Task(Protocol):
    """One piece of work that is under way."""

    def advance(self, steps: int = 1) -> None:
        """Say that ``steps`` more are done."""


class Progress:
    """Bars on a terminal, plain lines in a log, nothing when ``quiet``."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, line: str) -> None:
        """Print one line, above any bar."""
        self.console.print(printable(line), markup=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Task]:
        """Show ``description`` with a bar of ``total`` steps while the block runs."""
        if not self.console.is_terminal:
            self.say(f"  {description} ...")
        bar = RichProgress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with bar:
            yield _BarTask(bar, description, total)


class _BarTask:
    def __init__(self, bar: RichProgress, description: str, total: int) -> None:
        self._bar, self._id = bar, bar.add_task(description, total=total)

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._id, steps)
