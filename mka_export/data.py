"""The data folders that ship with the product: ``targets/`` and ``sample_prompts/``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from mka_export.errors import MkaError


def data_folder(name: str) -> Path:
    """Return a shipped data folder: inside the package when installed, at the top level in a checkout."""
    package = Path(__file__).parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        MkaError: it cannot be read or is not TOML; the message names the file.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MkaError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MkaError(f"{path} is not valid TOML: {error}", "Correct the file.") from error
