"""A page on which artifacts are talked to in a browser: what may be served, its scripts, and the server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mka_export.errors import UsageError
from mka_export.progress import Progress

if TYPE_CHECKING:
    from mka_export.options import ServeOptions


def serve(out: Path | None, chosen: ServeOptions) -> int:
    """Do what ``mka-export serve`` was asked for: set the page up, serve ``out`` until Ctrl-C, or both.

    Returns:
        the exit code.

    Raises:
        UsageError: there is nothing to do.
        SourceError, ServeError: no set-up, no artifact, or no address to serve from.
    """
    from mka_export.models.sources import cache_folder
    from mka_export.serve.artifacts import find_artifacts
    from mka_export.serve.running import run
    from mka_export.serve.scripts import require_scripts, set_up

    if out is None and not chosen.setup:
        raise UsageError("there is nothing to serve", "Name an output folder or an artifact, or give --setup.")
    if chosen.setup:
        set_up(cache_folder(), Progress())
    if out is not None:
        found = find_artifacts(out)
        run(found, require_scripts(cache_folder()), chosen.host, chosen.port, tls=chosen.tls)
    return 0
