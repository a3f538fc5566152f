"""What a target can ask of this converter: a precision, and options."""

from __future__ import annotations

from dataclasses import dataclass

from mka_export.converting import is_plain_name, options_of, precision_of, require_valid
from mka_export.target import Target


@dataclass(frozen=True)
class Precision:
    """A number format of the graph's weights.

    Attributes:
        dtype: transformers.js' name of it.
        suffix: of the graph's file name, by which transformers.js finds it.
        bits: of a weight of a matrix.
        quantized: the matrices are ``MatMulNBits``, in blocks with a scale.
        provider: for whose operators the builder makes the graph: for the CPU it takes attention of float16 apart.
    """

    dtype: str
    suffix: str
    bits: int
    quantized: bool = False
    provider: str = "cpu"

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the key-value cache."""
        return 2 if self.bits == 16 else 4

    @property
    def graph(self) -> str:
        """Where the graph is in its folder."""
        return f"onnx/model{self.suffix}.onnx"


# The names are the builder's; dtypes and suffixes those of transformers.js (its utils/dtypes.js).
PRECISIONS = {
    "fp32": Precision("fp32", "", 32),
    "fp16": Precision("fp16", "_fp16", 16, provider="webgpu"),
    "int8": Precision("q8", "_quantized", 8, quantized=True),
    "int4": Precision("q4", "_q4", 4, quantized=True),
}
ALGORITHMS = ("rtn", "k_quant", "gptq")
MIXED = ("none", "head", "sensitive")
BLOCKS = (16, 32, 64, 128, 256)
EIGHT_BIT_BLOCK = 64  # at least, in a graph of 4 bits


@dataclass(frozen=True)
class Options:
    """The options of a target that this converter understands.

    Attributes:
        block_size: how many weights of a row share a scale; of a row of 8 bits in an int4 graph, 64 at least.
        symmetric: blocks have no zero point.
        algorithm: how weights of 4 bits are rounded: ``rtn`` to the nearest, ``k_quant`` with a search for scales, ``gptq``
            with a look at what they are multiplied with on the calibration text.
        mixed: which matrices of an int4 graph have 8 bits: ``none``, the ``head``, or the ``sensitive`` ones too: all q, k
            and v, the MLPs of the first tenth of the layers and the last sixth, and down in the first and last eighth and
            every third layer.
        file_stem: the folder's name without the precision; if None, the checkpoint folder's.
    """

    block_size: int = 32
    symmetric: bool = False
    algorithm: str = "gptq"
    mixed: str = "sensitive"
    file_stem: str | None = None


def read_settings(target: Target) -> tuple[Precision, Options]:
    """Return the precision and the options that ``target`` asks for.

    Raises:
        ConversionError: there is no such precision or option, or an option's value cannot be.
    """
    precision, options = precision_of(target, PRECISIONS), options_of(target, Options)
    checks = {
        "block_size": (_is_block(options.block_size), f"one of {', '.join(map(str, BLOCKS))}"),
        "symmetric": (isinstance(options.symmetric, bool), "true or false"),
        "algorithm": (options.algorithm in ALGORITHMS, f"one of {', '.join(ALGORITHMS)}"),
        "mixed": (isinstance(options.mixed, str) and options.mixed in MIXED, f"one of {', '.join(MIXED)}"),
        "file_stem": (options.file_stem is None or is_plain_name(options.file_stem), "a plain file name"),
    }
    require_valid(target, options, checks)
    return precision, options


def eight_bit_block(precision: Precision, options: Options) -> int:
    """Return how many weights of a row of 8 bits share a scale."""
    return options.block_size if precision.bits == 8 else max(EIGHT_BIT_BLOCK, options.block_size)


def fitted(precision: Precision, options: Options) -> bool:
    """Whether weights are fitted to the calibration text after the builder."""
    return precision.bits == 4 and options.algorithm == "gptq"


def builder_options(precision: Precision, options: Options) -> dict[str, str]:
    """Return the options in the words of the builder's own parser."""
    words = {"hf_token": "false", "hf_remote": "false", "filename": precision.graph}
    if precision.quantized:
        words |= {
            "algo_config": "rtn" if options.algorithm == "gptq" else options.algorithm,
            "block_size": str(options.block_size),
            "is_symmetric": str(options.symmetric).lower(),
        }
    return words


def _is_block(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in BLOCKS
