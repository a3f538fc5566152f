"""Writing files that appear whole."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from mka_export.publish import save_array


def test_an_array_is_read_back(tmp_path):
    save_array(tmp_path / "a.npy", np.arange(6.0).reshape(2, 3))
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.arange(6.0).reshape(2, 3))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_array_for_which_there_is_no_room_says_so():
    with pytest.raises(OSError, match="No space left") as caught:
        save_array(Path("/dev/full"), np.zeros(10_000))
    assert caught.value.errno == errno.ENOSPC
