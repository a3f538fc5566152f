"""What stands before a text, and how long it may be: read from the artifact, for a runtime tells only ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from mka_export.data import load_json, value_of
from mka_export.errors import MkaError, RuntimeFailure, UnsupportedError
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.gguf_file import read_gguf
from mka_export.models.gguf_tokenizer import write_tokenizer
from mka_export.models.tokenizer import leading_id, load_tokenizer
from mka_export.parity.runtimes import ONNX_CONFIG


@dataclass(frozen=True)
class Frame:
    """How texts are given to a model.

    Attributes:
        leading: the BOS id, where the tokenizer puts one before every text.
        prefix: what a text without a context is predicted from: BOS, or EOS where there is none.
        context: the longest text, in tokens.
    """

    leading: int | None
    prefix: int
    context: int

    @classmethod
    def of(cls, path: Path) -> Frame:
        """Read it from a GGUF file, an ONNX folder or a checkpoint.

        Raises:
            RuntimeFailure: it is damaged, or its tokenizer is of an unknown kind, or has neither BOS nor EOS.
        """
        try:
            return cls._of(path)
        except MkaError as error:
            raise RuntimeFailure(error.what, error.remedy) from error
        except (OSError, ValueError) as error:
            raise RuntimeFailure(f"{path} does not say how long a text may be: {error}", "Make it anew.") from error

    @classmethod
    def _of(cls, path: Path) -> Frame:
        if path.is_file():
            file = read_gguf(path)
            context = file.get(f"{file.get('general.architecture', str)}.context_length", int)
            with TemporaryDirectory() as folder:
                write_tokenizer(file, Path(folder), context)
                return cls._with(load_tokenizer(Path(folder)), context, path)
        if (path / ONNX_CONFIG).is_file():
            model = value_of(load_json(path / ONNX_CONFIG), "model", dict)
            return cls._with(load_tokenizer(path), value_of(model, "context_length", int), path)
        context = value_of(Checkpoint.open(path).config, "max_position_embeddings", int)
        return cls._with(load_tokenizer(path), context, path)

    @classmethod
    def _with(cls, tokenizer: PreTrainedTokenizerBase, context: int, path: Path) -> Frame:
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if not isinstance(prefix, int):
            raise UnsupportedError(
                f"the tokenizer of {path} has neither BOS nor EOS", "A text needs one to begin with."
            )
        return cls(leading_id(tokenizer), prefix, context)
