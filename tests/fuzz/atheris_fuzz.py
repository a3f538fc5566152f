"""Fuzz one kind of file, guided by coverage: ``python tests/fuzz/atheris_fuzz.py KIND --seconds 600``.

Starts from the corpus and the sound files. An input with which something but an ``MkaError`` escapes, or that takes too
long or too much memory, ends the run and is left in the kind's corpus folder, where ``test_fuzz.py`` finds it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris
from mutations import mutate

CORPUS = Path(__file__).parent / "corpus"
SECONDS_EACH = 10
MEGABYTES = 4096
BYTES = 1 << 14  # of an input: twice the largest sound file

with atheris.instrument_imports(include=["mka_export", "mka_gguf"]):  # torch and transformers would take minutes
    import readers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=readers.READERS)
    parser.add_argument("--seconds", type=int, default=600)
    arguments = parser.parse_args()
    fuzz(arguments.kind, arguments.seconds)


def fuzz(kind: str, seconds: int) -> None:
    """Fuzz for so long, or until something is found; ends the process."""

    def read(data: bytes) -> None:
        readers.refusal(kind, data)

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        rng = Random(seed)
        changed: bytes = mutate(kind, data, rng) if rng.random() < 0.5 else atheris.Mutate(data, max_size)
        return changed[:max_size]

    found = CORPUS / kind
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as start:  # gets the inputs that reach new code, too
        for number, data in enumerate(readers.sound(kind)):
            (Path(start) / f"sound-{number}").write_bytes(data)
        limits = [f"-max_total_time={seconds}", f"-timeout={SECONDS_EACH}", f"-rss_limit_mb={MEGABYTES}"]
        options = [*limits, f"-max_len={BYTES}", f"-artifact_prefix={found}/"]
        atheris.Setup([sys.argv[0], *options, start, str(found)], read, custom_mutator=change)
        readers.limit_memory()
        atheris.Fuzz()


if __name__ == "__main__":
    main()
