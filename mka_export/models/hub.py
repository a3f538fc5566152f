"""Models on the Hugging Face hub: safetensors only, pinned to a commit, kept in the hub client's cache."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

# HTTPError is the base error of httpx or httpx2, by the client's version.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # re-exported without saying so

from mka_export.errors import MkaError, SourceError
from mka_export.models.checkpoint import CONFIG, INDEX, TOKENIZER_FILES, Checkpoint, read_config
from mka_export.models.licence import CARD, LICENCE_FILES
from mka_export.needs import require_room
from mka_export.progress import Progress

# "model*" leaves out a second copy of the weights in the maker's own format (consolidated.safetensors).
PATTERNS = [CONFIG, INDEX, "model*.safetensors", *TOKENIZER_FILES, CARD, *LICENCE_FILES]
CACHE_REMEDY = "Free space there, or set HF_HOME to a folder on a larger disk."
PICKLED = (".bin", ".pt", ".pth")


def fetch_hub(model: str, revision: str | None, progress: Progress) -> tuple[Path, str]:
    """Return a model's checkpoint folder in the hub client's cache, and its commit.

    Without a network, the commit that the cache holds for ``revision`` is taken.

    Raises:
        SourceError: there is no such model or revision, it is gated, out of reach, or has no safetensors.
        UnsupportedError: its config is of a kind we do not read; found before the weights are fetched.
    """
    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
    except (HTTPError, HFValidationError, OSError) as error:
        if isinstance(error, HFValidationError) or _status(error) not in (None, *range(500, 600)):
            raise _explained(model, revision, error) from error
        return _from_cache(model, revision, error, progress)
    _check_files(model, [file.rfilename for file in info.siblings or ()])
    progress.say(f"fetching {model} at {info.sha} from the hub, unless the hub client's cache holds it")
    try:
        # The config first: a model we cannot read is refused before its weights travel.
        _config(model, revision)
        wanted = filter_repo_objects(info.siblings or (), allow_patterns=PATTERNS, key=lambda file: file.rfilename)
        absent = [file for file in wanted if not _is_file_cached(model, info.sha, file.rfilename)]
        require_room(Path(HF_HUB_CACHE), sum(file.size or 0 for file in absent), f"fetching {model}", CACHE_REMEDY)
        return _pinned(snapshot_download(model, revision=revision, allow_patterns=PATTERNS))
    except (HTTPError, OSError) as error:
        raise _explained(model, revision, error) from error


def fetch_hub_config(model: str, revision: str | None) -> dict[str, Any]:
    """Return a model's ``config.json``, the only file that is fetched.

    Raises:
        SourceError, UnsupportedError: as ``fetch_hub``.
    """
    try:
        return _config(model, revision)
    except (HTTPError, HFValidationError, OSError) as error:
        raise _explained(model, revision, error) from error


def is_cached(model: str, revision: str | None) -> bool:
    """Tell whether the hub client's cache holds a model whole."""
    try:
        Checkpoint.open(Path(snapshot_download(model, revision=revision, local_files_only=True)))
    except (OSError, HFValidationError, MkaError):
        return False
    return True


def _is_file_cached(model: str, commit: str | None, name: str) -> bool:
    return isinstance(try_to_load_from_cache(model, name, revision=commit), str)  # else None, or known not to exist


def _config(model: str, revision: str | None) -> dict[str, Any]:
    return read_config(Path(snapshot_download(model, revision=revision, allow_patterns=[CONFIG])))[0]


def _pinned(snapshot: str) -> tuple[Path, str]:
    return Path(snapshot), Path(snapshot).name  # the cache names a snapshot's folder by its commit


def _check_files(model: str, names: list[str]) -> None:
    if any(name == CONFIG for name in names) and any(Path(name).match("model*.safetensors") for name in names):
        return
    if any(name.endswith(".gguf") for name in names):
        raise SourceError(f"{model} holds GGUF files and no checkpoint", "Download the one you want and give its path.")
    if any(name.endswith(PICKLED) for name in names):
        raise SourceError(
            f"{model} holds only pickled weights (.bin, .pt), which can run code when they are read",
            "Convert them where you trust them: load the model in transformers, save_pretrained() it, give that folder.",
        )
    raise SourceError(
        f"{model} holds no {CONFIG} with model*.safetensors", "Choose a repository with a language model."
    )


def _from_cache(model: str, revision: str | None, reason: Exception, progress: Progress) -> tuple[Path, str]:
    try:
        path, commit = _pinned(
            snapshot_download(model, revision=revision, allow_patterns=PATTERNS, local_files_only=True)
        )
    except OSError:
        raise _explained(model, revision, reason) from reason
    progress.say(f"the hub is out of reach: taking {model} at {commit} from the hub client's cache")
    return path, commit


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _explained(model: str, revision: str | None, error: Exception) -> SourceError:
    if isinstance(error, GatedRepoError):
        return SourceError(
            f"{model} is gated: its makers ask for an account that has accepted the licence",
            f"Accept it at https://huggingface.co/{model}, then run: hf auth login",
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceError(f"{model} has no revision {revision}", "Give one of its branches, tags or commits.")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return SourceError(
            f"the hub has no model {model}, or it is private",
            "Check the spelling; for a private model run: hf auth login",
        )
    if (status := _status(error)) is not None:
        return SourceError(f"the hub answered {status} for {model}", "Try again later, or give a local folder.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return SourceError(
            f"the hub client's cache cannot be written: {error.strerror} ({error.filename})",
            "Free space there, or set HF_HOME to a folder you can write to.",
        )
    return SourceError(
        f"the hub is out of reach, and its cache on this machine does not hold {model} whole",
        "Connect to the network (and unset HF_HUB_OFFLINE), or download the model elsewhere and give its folder.",
    )
