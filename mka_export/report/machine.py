"""What a machine has, and what a job will take of it, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mka_export.needs import size
from mka_export.report.terminal import model_line


def print_forecast(forecast: Mapping[str, Any], console: Console) -> None:
    """Print what ``pipeline.forecast.Forecast.to_dict`` says."""
    for line in _about_the_job(forecast):
        console.print(Text(line))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("at most", no_wrap=True)
    for column in ("disk, stays", "disk, meanwhile", "memory"):
        table.add_column(column, justify="right")
    for name, need in forecast["stages"].items():
        table.add_row(name, *(size(need[key]) if need[key] else "–" for key in ("kept", "scratch", "memory")))
    console.print(table)
    for folder, disk in forecast["disks"].items():
        _print_balance(f"Disk      {folder}", disk, console)
    _print_balance("Memory    of all processes together", forecast["memory"], console)


def _about_the_job(forecast: Mapping[str, Any]) -> Iterator[str]:
    model, source = forecast["model"], forecast["source"]
    yield model_line({**model, "name": source["name"], "source": source})
    if forecast["layers"] < model["layers"]:
        left = f"{forecast['layers']} layers{' or fewer' if forecast['or_fewer'] else ''}"
        yield f"Merge     {model['layers']} → {left} by {forecast['method']}"


def _print_balance(what: str, balance: Mapping[str, int], console: Console) -> None:
    enough = balance["needed"] <= balance["free"]
    line = Text(f"{what}: needs {size(balance['needed'])}, free {size(balance['free'])}  ")
    console.print(line.append("enough" if enough else "NOT ENOUGH", style="green" if enough else "bold red"))


def print_machine(machine: Mapping[str, Any], console: Console) -> None:
    """Print what ``pipeline.machine.examine`` found."""
    console.print(Text(f"System    {machine['system']}, Python {machine['python']}, {machine['cores']} cores"))
    console.print(Text("Packages  " + ", ".join(f"{name} {version}" for name, version in machine["packages"].items())))
    for name, runtime in machine["runtimes"].items():
        found = Text(f"Runtime   {name}: ")
        problem = runtime["error"]
        console.print(
            found.append(problem, style="bold red") if problem else found.append(", ".join(runtime["devices"]))
        )
    console.print(Text(f"Formats   {', '.join(machine['converters'])}"))
    memory = machine["memory"]
    console.print(Text(f"Memory    {size(memory['free'])} free of {size(memory['total'])}"))
    for folder, free in machine["disks"].items():
        console.print(Text(f"Disk      {folder}: {size(free)} free"))
