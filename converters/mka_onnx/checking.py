"""What is looked at before any work. Imports nothing of ONNX, so that what is not installed can be said."""

from __future__ import annotations

from mka_export.errors import ConversionError
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.outline import Outline
from mka_export.target import Target
from mka_onnx.building import require_builder
from mka_onnx.scope import require_expressible
from mka_onnx.settings import fitted, read_settings


def check(checkpoint: Checkpoint, target: Target) -> None:
    """Check that the target's settings are known, the builder is installed, and that it knows the model.

    Raises:
        ConversionError, UnsupportedError: as ``convert`` would.
    """
    precision, options = read_settings(target)
    if fitted(precision, options) and not target.calibration:
        raise ConversionError(
            f"target {target.name}: algorithm gptq needs the calibration text",
            "Set calibration = true in the target's file, or another algorithm.",
        )
    require_builder()
    require_expressible(Outline.of_checkpoint(checkpoint), precision, options)
