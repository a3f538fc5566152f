"""What a source will bring, said before it is fetched."""

from __future__ import annotations

from pathlib import Path

from mka_export.hashes import file_sha256
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.outline import Outline
from mka_export.models.sources import Source
from mka_export.needs import Need


def expected_outline(source: Source) -> Outline:
    """Return the model that ``source`` will be. Of a hub model without a short name, the config is fetched.

    Raises:
        SourceError, CheckpointError, UnsupportedError: the model cannot be had, or read.
    """
    if source.entry is not None:
        return Outline.of_entry(source.entry)
    if source.kind == "directory":
        return Outline.of_checkpoint(Checkpoint.open(Path(source.id)))
    if source.kind == "gguf":
        from mka_export.models.gguf_source import gguf_outline

        return gguf_outline(Path(source.id))
    from mka_export.models.hub import fetch_hub_config

    return Outline.of_config(fetch_hub_config(source.id, source.revision))


def fetch_need(source: Source, model: Outline, cache: Path) -> tuple[Path, Need]:
    """Return where ``sources.fetch`` puts a model, and what that takes; nothing where it is there already."""
    if source.kind == "directory":
        return Path(source.id), Need()
    if source.kind == "hub":
        from huggingface_hub.constants import HF_HUB_CACHE

        from mka_export.models.hub import is_cached

        there = is_cached(source.id, source.revision)
        return Path(HF_HUB_CACHE), Need() if there else Need(kept=model.nbytes)
    from mka_export.models.unpacked import unpacked_folder

    sha256 = source.entry.sha256 if source.entry else file_sha256(Path(source.id))
    if unpacked_folder(sha256, cache).is_dir():
        return cache, Need()
    file = source.entry.nbytes if source.entry else 0
    # The wheel is about as large as the file inside, and goes again.
    return cache, Need(kept=file + model.nbytes, scratch=file)
