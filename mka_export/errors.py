"""The errors a user can meet: each says what is wrong, where, and what to do, in one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 2000  # characters of a message; a name in a file may have millions


class MkaError(Exception):
    """Base class of every error that is shown to a user, without a traceback.

    Args:
        what: what is wrong, naming the file, tensor or option and the values seen.
        remedy: what to do about it, as an instruction.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what, self.remedy = what, remedy
        message = f"{what.rstrip('.')}. {remedy}" if remedy else what
        super().__init__(printable(" ".join(message.split())))

    def __reduce__(self) -> tuple[type[MkaError], tuple[str, str]]:
        """Pickle, to come back from another process."""
        return type(self), (self.what, self.remedy)


class UsageError(MkaError):
    """An option, or a combination of options, that cannot be."""

    exit_code = 2


class SourceError(MkaError):
    """A model that cannot be found, fetched or recognised."""


class CheckpointError(MkaError):
    """A checkpoint or GGUF file that is damaged, incomplete or of a kind we do not read."""


class UnsupportedError(MkaError):
    """A sound model that the wanted step cannot handle."""


class WorkspaceError(MkaError):
    """An output folder that cannot be used."""


class ConversionError(MkaError):
    """A converter that could not make its artifact."""


class RuntimeFailure(MkaError):
    """A runtime that could not load or run an artifact."""


class ServeError(MkaError):
    """A page that cannot be set up or served."""


def printable(text: str) -> str:
    """Return ``text`` as a line that a terminal shows and does not obey; without the middle, if it is endless."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of Python or torch says that memory ran out."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported for this
        or (isinstance(error, RuntimeError) and "allocate memory" in str(error))  # torch's on the CPU
    )


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that ``name`` is no known ``kind``, with the nearest spelling and the list of known names."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}"
