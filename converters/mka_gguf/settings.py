"""What a target can ask of this converter: a precision, and options."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from mka_export.converting import is_plain_name, options_of, precision_of, require_valid
from mka_export.target import Target


@dataclass(frozen=True)
class Precision:
    """One of llama.cpp's mixes of tensor types.

    Attributes:
        file_type: llama.cpp's number for the mix.
        matrix: the type of most matrices.
        imatrix: whether column statistics are used unless the target says otherwise: at 4 bits and fewer.
    """

    file_type: LlamaFileType
    matrix: GGMLQuantizationType
    imatrix: bool = False

    @property
    def block(self) -> int:
        """How many values of a row are quantized together; 1 where nothing is quantized."""
        return int(GGML_QUANT_SIZES[self.matrix][0])

    @property
    def quantized(self) -> bool:
        """Whether llama.cpp's quantizer makes it."""
        return self.block > 1


PRECISIONS = {
    "f32": Precision(LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
    "f16": Precision(LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    "bf16": Precision(LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
    "q8_0": Precision(LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0),
    "q6_k": Precision(LlamaFileType.MOSTLY_Q6_K, GGMLQuantizationType.Q6_K),
    "q5_k_m": Precision(LlamaFileType.MOSTLY_Q5_K_M, GGMLQuantizationType.Q5_K),
    "q4_k_m": Precision(LlamaFileType.MOSTLY_Q4_K_M, GGMLQuantizationType.Q4_K, imatrix=True),
    "q4_0": Precision(LlamaFileType.MOSTLY_Q4_0, GGMLQuantizationType.Q4_0, imatrix=True),
    "q3_k_m": Precision(LlamaFileType.MOSTLY_Q3_K_M, GGMLQuantizationType.Q3_K, imatrix=True),
    "iq4_xs": Precision(LlamaFileType.MOSTLY_IQ4_XS, GGMLQuantizationType.IQ4_XS, imatrix=True),
}


@dataclass(frozen=True)
class Options:
    """The options of a target that this converter understands.

    Attributes:
        imatrix: whether column statistics guide the quantizer; None for the precision's default.
        max_fallback: the share (0 to 1) of the matrices' values that may be of another type than asked for,
            because their rows do not fit the block; None for any.
        file_stem: the artifact's name without precision and suffix, and the model's name inside it; if None, the
            checkpoint folder's name, inside the file that of its model card first.
    """

    imatrix: bool | None = None
    max_fallback: float | None = None
    file_stem: str | None = None


def read_settings(target: Target) -> tuple[Precision, Options]:
    """Return the precision and the options that ``target`` asks for.

    Raises:
        ConversionError: there is no such precision or option, or an option's value cannot be.
    """
    precision, options = precision_of(target, PRECISIONS), options_of(target, Options)
    checks = {
        "imatrix": (options.imatrix is None or isinstance(options.imatrix, bool), "true or false"),
        "max_fallback": (options.max_fallback is None or _is_share(options.max_fallback), "a share from 0 to 1"),
        "file_stem": (options.file_stem is None or is_plain_name(options.file_stem), "a plain file name"),
    }
    require_valid(target, options, checks)
    return precision, options


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
