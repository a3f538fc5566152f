"""lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on our runtimes: any task, any artifact."""

from __future__ import annotations

from importlib.util import find_spec

from mka_export.errors import UsageError

PACKAGES = (
    "lm-eval",
    "datasets",
    "transformers",
    "tokenizers",
)  # whose versions a result depends on, the runtime's apart


def require_harness() -> None:
    """Check that the harness is there, without importing it.

    Raises:
        UsageError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise UsageError("lm-evaluation-harness is not installed", "Install it: pip install 'mka-export[eval]'.")
