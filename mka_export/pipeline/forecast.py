"""What a whole job will take of this machine, before it starts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from mka_export.errors import WorkspaceError
from mka_export.models.outline import Outline
from mka_export.needs import Need, disk_peak, existing, free_bytes, size
from mka_export.workspace import pieces_folder, read_record

FETCH = "fetch"
# Python with torch, transformers and scikit-learn in it, and the runtime's process with llama.cpp: measured 0.43
# and 0.11 GB.
BASE_BYTES = 600_000_000


@dataclass(frozen=True)
class Forecast:
    """The stages of a job, and what each takes at most.

    Attributes:
        model: the original.
        layers: how many are left.
        or_fewer: that is the most: a limit decides.
        method: how they are merged; None where they are not.
        cache: where the model is fetched to.
        fetch: what that takes.
        out: the output folder.
        stages: name -> what it takes besides what is there already.
    """

    model: Outline
    layers: int
    or_fewer: bool
    method: str | None
    cache: Path
    fetch: Need
    out: Path
    stages: Mapping[str, Need]

    @property
    def memory(self) -> int:
        """Anonymous memory in bytes, of all processes together, at most."""
        return BASE_BYTES + max(need.memory for need in (self.fetch, *self.stages.values()))

    @property
    def disks(self) -> dict[Path, int]:
        """Folder -> bytes that it must have free; folders on one file system are added up under the first."""
        wanted = {self.out: disk_peak(self.stages.values())}
        fetch = disk_peak([self.fetch])
        if fetch and _file_system(self.cache) == _file_system(self.out):
            wanted[self.out] = max(fetch, self.fetch.kept + wanted[self.out])
        elif fetch:
            wanted[self.cache] = fetch
        return wanted

    def require_disk(self) -> None:
        """Check that the disk has room.

        Raises:
            WorkspaceError: it has not.
        """
        if shortfalls := self.disk_shortfalls:
            raise WorkspaceError(f"the job needs {shortfalls[0]}", "Free space there, or choose another --out.")

    @property
    def disk_shortfalls(self) -> list[str]:
        """Which disks have too little room, in words."""
        return [
            f"{size(nbytes)} of disk in {folder}, where {size(free)} are free"
            for folder, nbytes in self.disks.items()
            if nbytes > (free := free_bytes(folder))
        ]

    @property
    def memory_shortfall(self) -> str | None:
        """That the machine has too little memory, in words; None where it has enough."""
        free = free_memory()
        return f"{size(self.memory)} of memory, where {size(free)} are free" if self.memory > free else None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {
            "model": {
                "family": self.model.architecture.name,
                "layers": self.model.num_layers,
                "parameters": self.model.parameters,
                "nbytes": self.model.nbytes,
            },
            "layers": self.layers,
            "or_fewer": self.or_fewer,
            "method": self.method,
            "stages": {name: asdict(need) for name, need in {FETCH: self.fetch, **self.stages}.items()},
            "disks": {
                str(folder): {"needed": nbytes, "free": free_bytes(folder)} for folder, nbytes in self.disks.items()
            },
            "memory": {"needed": self.memory, "free": free_memory()},
            "shortfalls": [*self.disk_shortfalls, *filter(None, [self.memory_shortfall])],
        }


def left_to_do(
    out: Path, stages: Mapping[str, Need], known: Mapping[str, Mapping[str, Any]], first: Iterable[str]
) -> dict[str, Need]:
    """Return the stages with what is still to be made: published ones take nothing, finished pieces no disk again.

    Args:
        stages: in the order in which they are made; ``parity/NAME`` and the like are of what stage ``NAME`` makes.
        known: name -> those of a stage's inputs that are known beforehand. One that was published with others is made anew.
        first: stages on which all later ones depend.
    """
    left: dict[str, Need] = {}
    anew: set[str] = set()
    for name, need in stages.items():
        final = out / name
        record, inputs = read_record(final), json.loads(json.dumps(known.get(name, {})))
        spoilt = not anew.isdisjoint({*first, *Path(name).parts})
        if record and not spoilt and all(record["inputs"].get(key) == inputs[key] for key in inputs):
            left[name] = Need()
            continue
        anew.add(name)
        pieces = sum(path.stat().st_size for path in pieces_folder(final).rglob("*") if path.is_file())
        left[name] = replace(need, scratch=max(0, need.scratch - pieces))
    return left


def free_memory() -> int:
    """Return the bytes of memory that new work can have."""
    return int(psutil.virtual_memory().available)


def _file_system(folder: Path) -> int:
    return existing(folder).stat().st_dev
