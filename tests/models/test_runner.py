"""Memory of the layer runner."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
from pico import make_pico

FREE = """
import ctypes, sys
from pathlib import Path
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.runner import LayerRunner

class Statistics(ctypes.Structure):  # struct mallinfo2 of glibc's malloc.h
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]

runner = LayerRunner(Checkpoint.open(Path(sys.argv[1])))
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Statistics
print(mallinfo2().fordblks)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="it is glibc that keeps what is freed")
def test_building_the_empty_model_leaves_no_holes(tmp_path):
    """Holes of a layer's size, as many as there are layers: what is allocated later would fill and keep them."""
    wide = make_pico(tmp_path / "wide", "llama", intermediate_size=24576, num_hidden_layers=6)  # 4 M weights a layer
    process = subprocess.run([sys.executable, "-c", FREE, str(wide)], capture_output=True, text=True, check=True)
    assert int(process.stdout) < 3e6  # where it was built first: 107 MB, or by chance 6.5
