"""Markdown as GitHub and the Hugging Face hub read it, from text that nobody vouches for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mka_export.errors import printable

# Whatever begins markup, a mention, mathematics or HTML. As entities they are text everywhere, inside tables too.
SPECIAL = "&<>|`*_[]\\~#@$"
ENTITIES = str.maketrans({character: f"&#{ord(character)};" for character in SPECIAL})


def escape(text: object) -> str:
    """Return ``text`` as one line that is shown as it is, and is no link."""
    line = printable(" ".join(str(text).split()))
    return line.translate(ENTITIES).replace("://", ":&#47;&#47;").replace("www.", "www&#46;")


def code(text: object) -> str:
    """Return ``text`` in the type of code."""
    return f"<code>{escape(text)}</code>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table's lines; cells are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def details(summary: str, lines: Iterable[str]) -> list[str]:
    """Return lines that are folded away under ``summary``."""
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>", ""]
