"""The lists that ``mka-export models`` and ``mka-export targets`` print: one line each, whatever the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mka_export.models.catalog import catalog
from mka_export.needs import size
from mka_export.target import load_target, target_names


def print_models() -> None:
    """Print every short name and where it comes from."""
    rows = [
        (
            entry.alias,
            entry.family,
            f"{entry.layers} layers",
            f"{entry.parameters / 1e9:.2f} B",
            entry.licence,
            (f"hub {entry.hub}" if entry.hub else f"pip {entry.wheel}") + (", gated" if entry.gated else ""),
        )
        for entry in catalog().values()
    ]
    _print_columns(rows)


def print_targets() -> None:
    """Print every shipped target."""
    targets = [load_target(name) for name in target_names()]
    _print_columns([(t.name, t.precision, t.runtime, t.description) for t in targets])


def print_offers(offers: Iterable[Mapping[str, Any]]) -> None:
    """Print what each target would be for a model: ``pipeline.offers.Offer.to_dict`` of each."""
    rows = [
        (
            offer["target"],
            offer["precision"],
            offer["runtime"],
            f"cannot be made: {offer['problem']}"
            if offer["problem"]
            else f"at most {size(offer['nbytes'])}; making it takes {size(offer['memory'])} of memory",
        )
        for offer in offers
    ]
    _print_columns(rows)


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
