"""Text of a dataset on the Hugging Face hub, read row by row as far as it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mka_export.errors import SourceError, UsageError
from mka_export.models.text import Text

PREFIX = "hub:"  # and then NAME[:CONFIG[:SPLIT]]


def dataset_text(spec: str, characters: int) -> Text:
    """Read the first rows of a dataset's text.

    The column is ``text``, or the only one that holds strings. Datasets that bring code of their own are not run: the
    library has no such thing any more (``datasets`` 4).

    Args:
        spec: ``hub:NAME[:CONFIG[:SPLIT]]``; the split is ``train`` unless named.
        characters: as many are read, if there are.

    Raises:
        UsageError: the spec is none, ``datasets`` is not installed, or no column holds text.
        SourceError: there is no such dataset, configuration or split, or the hub is out of reach.
    """
    name, *rest = spec.removeprefix(PREFIX).split(":")
    config, split = [*rest, *["", ""]][:2]
    if not name or len(rest) > 2:
        raise UsageError(f"--calibration {spec}: a dataset is written hub:NAME[:CONFIG[:SPLIT]]")
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"--calibration {spec} needs the package datasets", "Run: pip install 'mka-export[datasets]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        text = "\n".join(_until(characters, rows, spec))
    except UsageError:
        raise
    except Exception as error:  # whatever its readers of twenty formats, and the hub's client, raise
        reason = " ".join(str(error).split())
        raise SourceError(
            f"cannot read the dataset {spec}: {reason[:300]}", "Check the spelling, or give a text file."
        ) from error
    if not text.strip():
        raise SourceError(f"the dataset {spec} holds no text", "Choose another --calibration.")
    return Text(spec, text.replace("<unk>", ""))


def _until(characters: int, rows: Any, spec: str) -> Iterator[str]:
    for row in rows:
        text = row[_column(row, spec)]
        yield text
        characters -= len(text) + 1
        if characters <= 0:
            return


def _column(row: dict[str, Any], spec: str) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise UsageError(
            f"--calibration {spec}: its columns are {', '.join(row)}; none is called text",
            "Choose a dataset of plain text.",
        )
    return strings[0]
