"""A whole model in memory, as transformers runs it: for sampling and training, which need all layers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def load_whole(path: Path, device: torch.device) -> Any:
    """Load a checkpoint in float32, from safetensors only, without any code of its own."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no types for it
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True
    )
    return model.to(device)  # type: ignore[arg-type]  # its decorator hides the types
