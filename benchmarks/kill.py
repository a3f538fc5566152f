"""Does a killed job, run again, end as if nothing had happened? Real commands, and SIGKILL at random instants.

python benchmarks/kill.py --rounds 50
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
from job import COMMAND

from mka_export.hashes import file_sha256
from mka_export.pipeline.job import PARITY
from mka_export.report.card import CARD, CARDS
from mka_export.workspace import LOCK, RECORD, read_record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pico import make_pico

LIMITS = ["--max-ppl-ratio", "50", "--conversion-max-mean-kl", "5", "--conversion-max-ppl-ratio", "50"]
SMALL = ["--windows", "4", "--window-tokens", "64", "--calibration-tokens", "512", "--device", "cpu"]
JOB = ["--ratio", "0.4", "--protect", "1", "--to", "gguf-q8", *SMALL, *LIMITS, "--quiet"]
DONE = (0, 4)  # so little text may leave the verdict open
STAGES = ["starting", "merging", "writing unquantized", "quantizing", "measuring", "reporting"]


def start(*arguments: object, scratch: Path) -> subprocess.Popen[bytes]:
    """Start mka-export as a user does; a pico model has no use for more than one thread."""
    environment = {**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1"}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def killed(job: subprocess.Popen[bytes], after: float) -> bool:
    """Kill a job after so many seconds, unless it ends before."""
    try:
        job.wait(after)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()
        return True
    return False


def stage_of(out: Path) -> str:
    """Return what a job was doing when it was killed."""
    if not out.is_dir() or not ((out / "merged").is_dir() or (out / ".merged.pieces").is_dir()):
        return "starting"
    if not (out / "merged").is_dir():
        return "merging"
    if not (out / "gguf-q8").is_dir():
        return "quantizing" if (out / ".gguf-q8.pieces" / "unquantized.gguf.seal").exists() else "writing unquantized"
    return "reporting" if (out / "parity" / "gguf-q8").is_dir() else "measuring"


def half_made(out: Path) -> list[str]:
    """Return the folders under a final name that are not whole: of stages, and of model cards, which have no record."""
    folders = [p for p in (*out.glob("[!.]*"), *out.glob(f"{PARITY}/[!.]*")) if p.is_dir()]
    stages = [p for p in folders if p.name not in (PARITY, CARDS)]
    cards = [p for p in out.glob(f"{CARDS}/[!.]*") if not (p / CARD).is_file()]
    return [folder.relative_to(out).as_posix() for folder in (*(p for p in stages if not is_whole(p)), *cards)]


def is_whole(folder: Path) -> bool:
    """Tell whether a stage's folder has every file of its record."""
    record = read_record(folder)
    if record is None:
        return False
    return all(
        (folder / name).is_file() and file_sha256(folder / name) == record["files"][name] for name in record["files"]
    )


def results(out: Path) -> dict[str, str]:
    """Return the sha256 of all of checkpoint, plan and artifact."""
    files = [path for stage in ("merged", "gguf-q8") for path in (out / stage).rglob("*")]
    return {path.relative_to(out).as_posix(): file_sha256(path) for path in files if path.name != RECORD}


@click.command()
@click.option("--rounds", default=50)
@click.option("--seed", default=0)
def main(rounds: int, seed: int) -> None:
    """Print how many jobs were killed in which stage, and how many ended in the same bytes."""
    draw, kills, done, twice, failures = random.Random(seed), Counter(), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, scratch = make_pico(folder / "pico", "llama"), folder / "scratch"
        scratch.mkdir()
        for name in ("first", "second"):  # the first warms up the system's caches
            begin = time.monotonic()
            if start(model, *JOB, "--out", folder / name, scratch=scratch).wait() not in DONE:
                sys.exit("the job fails undisturbed")
            seconds, expected = time.monotonic() - begin, results(folder / name)
        print(f"{rounds} jobs on a pico Llama, killed at random in the {seconds:.1f} s of one, seed {seed}:")
        print(f"mka-export pico {' '.join(JOB)}\n", flush=True)
        while done < rounds:
            out, wrong, hit = Path(tempfile.mkdtemp(dir=folder)) / "out", [], []
            for _ in range(1 + (draw.random() < 0.25)):
                after = draw.uniform(0.0, seconds)
                if killed(start(model, *JOB, "--out", out, scratch=scratch), after):
                    hit.append(stage_of(out))
                wrong += [f"{stage} is half made" for stage in half_made(out)]
            if not hit:  # it ended before the instant came, and tells nothing
                continue
            if start(model, *JOB, "--out", out, scratch=scratch).wait() not in DONE:
                wrong.append("the job fails when run again")
            found = results(out)
            wrong += [f"{file} differs" for file in expected.keys() | found if expected.get(file) != found.get(file)]
            left = [path for path in (*out.rglob(".*"), *scratch.iterdir()) if path.name != LOCK]
            wrong += [f"{path.relative_to(folder)} is left" for path in left]
            if start("verify", out, scratch=scratch).wait():
                wrong.append("verify finds something")
            kills.update(hit)
            done += 1
            twice += len(hit) - 1
            failures += bool(wrong)
            print(f"{done:3}  {' and '.join(hit):40}{'; '.join(wrong) or 'identical'}", flush=True)
    print(f"\n{'killed while':22}kills")
    for stage in STAGES:
        print(f"{stage:22}{kills[stage]:5}")
    print(f"\n{rounds} killed jobs, {twice} of them twice: {rounds - failures} identical results")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
