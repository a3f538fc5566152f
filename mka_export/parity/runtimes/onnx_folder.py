"""A folder with an ONNX graph, as onnxruntime-genai lays it out: what both of its runtimes read of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import PreTrainedTokenizerBase

from mka_export.data import load_json, value_of
from mka_export.errors import CheckpointError, MkaError, RuntimeFailure
from mka_export.models.onnx_file import read_graph, require_own_files
from mka_export.models.tokenizer import load_tokenizer, text_ids
from mka_export.parity.runtimes import ONNX_CONFIG


@dataclass(frozen=True)
class OnnxFolder:
    """What a folder says of its model.

    Attributes:
        path: the folder.
        graph: the file of the graph.
        ends: ids that end a text.
        vocab_size: columns of the logits.
        tokenizer: that in the folder.
    """

    path: Path
    graph: Path
    ends: frozenset[int]
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def open(cls, path: Path) -> OnnxFolder:
        """Read and check a folder.

        Raises:
            RuntimeFailure: it is none, or damaged, or has its graph or weights outside of itself.
        """
        try:
            model = value_of(load_json(path / ONNX_CONFIG), "model", dict)
            name = PurePosixPath(value_of(value_of(model, "decoder", dict), "filename", str))
            graph = path / name
            if name.is_absolute() or ".." in name.parts or not graph.resolve().is_relative_to(path.resolve()):
                raise CheckpointError(f"{path / ONNX_CONFIG} names a graph outside of its folder: {name}")
            require_own_files(read_graph(graph), graph)
            return cls(path, graph, _ends(model), value_of(model, "vocab_size", int), load_tokenizer(path))
        except MkaError as error:
            raise RuntimeFailure(error.what, error.remedy) from error
        except (OSError, ValueError) as error:
            raise RuntimeFailure(f"{path} is no folder of an ONNX model: {error}", "Give one made here.") from error

    def tokenize(self, text: str) -> list[int]:
        """Turn text into ids."""
        return text_ids(self.tokenizer, text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens spelled out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _ends(model: dict[str, Any]) -> frozenset[int]:
    named = model.get("eos_token_id", [])
    return frozenset(i for i in (named if isinstance(named, list) else [named]) if isinstance(i, int))
