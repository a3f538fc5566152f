"""Which models can become a graph, as far as their config and shapes tell."""

from __future__ import annotations

from math import ceil

from mka_export.errors import UnsupportedError
from mka_export.models.outline import Outline
from mka_onnx.settings import Options, Precision

# What the builder makes a graph of (its create_model), and we can merge.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


def require_expressible(model: Outline, precision: Precision, options: Options) -> None:
    """Check that the builder knows the model, and that its rows fit the blocks.

    Raises:
        UnsupportedError: it does not, or they do not.
    """
    name = model.config["architectures"][0]
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"onnxruntime-genai's model builder makes no graph of {name}", f"It does of {', '.join(ARCHITECTURES)}."
        )
    if precision.bits == 4 and not options.symmetric:
        _require_even_blocks(model, options.block_size)


def _require_even_blocks(model: Outline, block_size: int) -> None:
    """Two zero points of 4 bits share a byte, and ONNX Runtime's quantizer fails where a row has an odd number."""
    for name, shape in model.shapes.items():
        if len(shape) == 2 and ceil(shape[1] / block_size) % 2:
            raise UnsupportedError(
                f"rows of {name} have an odd number of blocks of {block_size} weights, which ONNX Runtime's "
                "quantizer cannot give zero points",
                "Set symmetric = true in the target's options, or another block_size.",
            )
