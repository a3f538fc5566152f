"""What a model's makers say of its use: the licence's name, and the files that must travel with the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from mka_export.hashes import file_sha256

# Of a checkpoint's folder. Those of Llama are LICENSE.txt and USE_POLICY.md.
LICENCE_FILES = (
    *("LICENSE*", "LICENCE*", "License*", "NOTICE*", "Notice*", "COPYING*"),
    *("USE_POLICY*", "*ACCEPTABLE_USE*", "*Acceptable_Use*", "*acceptable_use*"),
)
CARD = "README.md"
MAX_CARD = 1 << 20  # bytes
HUB_IDS = {"Apache-2.0": "apache-2.0", "MIT": "mit"}  # the hub's, of names in the catalogue


@dataclass(frozen=True)
class Licence:
    """What is known of a model's licence: nothing, where all of it is None or empty.

    Attributes:
        id: the hub's identifier, e.g. ``apache-2.0``, or ``other``.
        name: as its makers call it, where the identifier does not say it.
        link: where its text is.
        files: licence, notice and use-policy files that came with the model, by name.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as a report has it; ``files`` is name -> sha256."""
        files = {name: file_sha256(path) for name, path in sorted(self.files.items())}
        return {"id": self.id, "name": self.name, "link": self.link, "files": files}


def licence_files(folder: Path) -> dict[str, Path]:
    """Return a checkpoint's licence, notice and use-policy files: name -> path."""
    return {path.name: path for pattern in LICENCE_FILES for path in sorted(folder.glob(pattern)) if path.is_file()}


def licence_of(folder: Path, known: str | None = None, files: Iterable[Path] = ()) -> Licence:
    """Find out what is known of the licence of the checkpoint in ``folder``.

    Args:
        folder: its README.md may have a front matter, as the hub's model cards do.
        known: the name of its licence, where the catalogue has one.
        files: more that came with it from elsewhere.
    """
    said = _front_matter(folder / CARD)
    found = licence_files(folder) | {path.name: path for path in files}
    if "license" not in said and known is not None:
        id = HUB_IDS.get(known)
        return Licence(id or "other", None if id else known, None, found)
    return Licence(said.get("license"), said.get("license_name"), said.get("license_link"), found)


def _front_matter(path: Path) -> dict[str, str]:
    """Return what a model card says in plain texts: a card that cannot be read is no reason to refuse a model."""
    try:
        data = metadata_load(path) if path.stat().st_size <= MAX_CARD else None
    except Exception:  # whatever the YAML parser raises
        data = None
    said = data if isinstance(data, dict) else {}
    firsts = {key: value[0] if isinstance(value, list) and value else value for key, value in said.items()}
    return {key: value.strip() for key, value in firsts.items() if isinstance(value, str) and value.strip()}
