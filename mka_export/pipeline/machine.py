"""What is installed, and what this machine can do."""

from __future__ import annotations

import os
import platform
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import psutil

from mka_export.errors import MkaError
from mka_export.models.sources import cache_folder
from mka_export.needs import free_bytes
from mka_export.parity.runtimes import RUNTIMES
from mka_export.parity.runtimes.isolated import usable_devices
from mka_export.pipeline.forecast import free_memory
from mka_export.pipeline.job import PACKAGES, versions
from mka_export.target import CONVERTERS


def examine() -> dict[str, Any]:
    """Return what is installed, which runtimes and devices work, and how much disk and memory is free."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "packages": versions(*PACKAGES),
        "runtimes": {name: _tried(name) for name in RUNTIMES},
        "converters": sorted(point.name for point in entry_points(group=CONVERTERS)),
        "memory": {"free": free_memory(), "total": psutil.virtual_memory().total},
        "disks": {str(folder): free_bytes(folder) for folder in (Path.cwd(), cache_folder())},
    }


def _tried(runtime: str) -> dict[str, Any]:
    try:
        return {"devices": usable_devices(runtime), "error": None}
    except MkaError as error:
        return {"devices": [], "error": str(error)}
