"""Everything that is served, by its path in the URL: nothing else can be asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from mka_export import __version__
from mka_export.serve.artifacts import Servable, identity
from mka_export.serve.scripts import PARTS, Scripts

PAGE = Path(__file__).parent / "page"
KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}


@dataclass(frozen=True)
class Resource:
    """What one URL stands for.

    Attributes:
        source: a file, or the bytes themselves.
        kind: its content type.
        keep: what a browser may do with it later (Cache-Control).
        state: what told the file from others when it was listed; None for bytes.
    """

    source: Path | bytes
    kind: str
    keep: str
    state: tuple[int, ...] | None = None


def site_of(artifacts: Sequence[Servable], scripts: Scripts) -> dict[str, Resource]:
    """Return the resources of the page: its own files, its libraries, the list of artifacts, and their files."""
    page = {f"/{path.name}": _file(path, "no-cache") for path in PAGE.iterdir() if path.suffix in KINDS}
    page["/"] = page.pop("/index.html")
    library = f"/lib/{scripts.folder.name}/"  # changes with the versions, so that they may be kept for good
    libraries = {library + name: _file(scripts.folder / name, "private, max-age=31536000, immutable") for name in PARTS}
    # The page itself keeps what it loads of models: browsers' own caches have no room for files of this size.
    models = {
        _folder(artifact) + name: _file(path, "no-store")
        for artifact in artifacts
        if not artifact.obstacle
        for name, path in artifact.files.items()
    }
    about = {
        "version": __version__,
        "library": library,
        "versions": dict(scripts.versions),
        "artifacts": [_about(artifact) for artifact in artifacts],
    }
    listing = Resource(json.dumps(about).encode(), KINDS[".json"], "no-store")
    return {**page, **libraries, **models, "/artifacts.json": listing}


def _file(path: Path, keep: str) -> Resource:
    return Resource(path, KINDS.get(path.suffix, "application/octet-stream"), keep, identity(path.stat()))


def _folder(artifact: Servable) -> str:
    return f"/models/{artifact.tag}/"


def _about(artifact: Servable) -> Mapping[str, object]:
    folder = _folder(artifact)
    (url,) = (quote(os.fsencode(folder + name)) for name in artifact.files) if artifact.kind == "gguf" else (folder,)
    return {
        "id": artifact.tag,
        "name": artifact.name,
        "target": artifact.target,
        "kind": artifact.kind,
        "nbytes": artifact.nbytes,
        "url": url,
        "obstacle": artifact.obstacle,
    }
