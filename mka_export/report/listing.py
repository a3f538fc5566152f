"""The lists that ``mka-export models`` and ``mka-export targets`` print."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mka_export.models.catalog import catalog
from mka_export.target import load_target, target_names


def print_models() -> None:
    """Print every short name and where it comes from."""
    table = Table("name", "family", "layers", "parameters", "licence", "from", box=None)
    for entry in catalog().values():
        origin = f"hub {entry.hub}" if entry.hub else f"pip {entry.wheel}"
        gate = " (gated: needs an account)" if entry.gated else ""
        size = f"{entry.parameters / 1e9:.2f} B"
        table.add_row(entry.alias, entry.family, str(entry.layers), size, entry.licence, origin + gate)
    Console().print(table)


def print_targets() -> None:
    """Print every shipped target."""
    table = Table("name", "precision", "runtime", "what for", box=None)
    for name in target_names():
        target = load_target(name)
        table.add_row(name, target.precision, target.runtime, target.description)
    Console().print(table)
