"""What the tests of ONNX share."""

from __future__ import annotations

from mka_export.target import Limits, Target


def target(precision: str, **options: object) -> Target:
    """A target that asks for ``precision``."""
    return Target(
        "pico", "a test", "onnx", precision, "onnxruntime", Limits(), Limits(), calibration=True, options=options
    )
