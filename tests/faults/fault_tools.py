"""What the tests of faults share: what is small enough for a test, and what is in a folder."""

from __future__ import annotations

from pathlib import Path

SMALL = ["--windows", "4", "--window-tokens", "64", "--calibration-tokens", "512", "--device", "cpu"]
LOOSE = ["--max-ppl-ratio", "50", "--conversion-max-mean-kl", "5", "--conversion-max-ppl-ratio", "50"]
DONE = (0, 4)  # so little text may leave the verdict open
MERGE = ["--ratio", "0.2", "--protect", "1"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def visible(out: Path) -> set[str]:
    """Return what stands in an output folder under a final name."""
    return {p.name for p in out.iterdir() if not p.name.startswith(".")} if out.is_dir() else set()
