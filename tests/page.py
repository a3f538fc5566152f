"""What the tests of the served page share: a set-up without npm, and artifacts without models."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mka_export.hashes import file_sha256
from mka_export.serve import scripts
from mka_export.serve.scripts import PACKAGES, PARTS, RECORD, Scripts
from mka_export.workspace import FORMAT

MAIN = "from mka_export.cli import main; main()"
NPM = """#!/bin/sh
# Stands for npm: makes what `npm ci` would, or does what it is told in $FAKE_NPM.
echo "$@" >> "$FAKE_NPM_LOG"
case "$FAKE_NPM" in
  refuse) echo 'npm error code EINTEGRITY' >&2; echo 'npm error sha512-x is not sha512-y' >&2
          echo 'npm error A complete log of this run is in /x' >&2; exit 1 ;;
  killed) mkdir -p node_modules/half; kill -KILL $PPID; sleep 5 ;;
  empty) mkdir node_modules; exit 0 ;;
esac
for part in {parts}; do
  mkdir -p "node_modules/$(dirname $part)"
  echo "// $part" > "node_modules/$part"
done
for package in {packages}; do
  echo '{{"version": "1.2.3"}}' > "node_modules/$package/package.json"
done
"""


def fake_npm(folder: Path) -> Path:
    """Put programs called ``node`` and ``npm`` into ``folder``, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "npm").write_text(NPM.format(parts=" ".join(PARTS.values()), packages=" ".join(PACKAGES.values())))
    (folder / "node").write_text("#!/bin/sh\n")
    for name in ("npm", "node"):
        (folder / name).chmod(0o755)
    return folder


def fake_setup(cache: Path) -> Scripts:
    """Publish scripts that do nothing, as ``set_up`` would."""
    folder = scripts._place(cache)
    folder.mkdir(parents=True)
    for name in PARTS:
        (folder / name).write_text(f"// {name}\n")
    record = {"versions": dict.fromkeys(PACKAGES, "1.2.3"), "files": {n: file_sha256(folder / n) for n in PARTS}}
    (folder / RECORD).write_text(json.dumps(record))
    return scripts.require_scripts(cache)


def fake_gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF" + bytes(range(96)))
    return path


def fake_onnx(folder: Path) -> Path:
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model_q4.onnx").write_bytes(b"graph")
    (folder / "onnx" / "model_q4.onnx_data").write_bytes(b"weights")
    (folder / "config.json").write_text('{"transformers.js_config": {"dtype": "q4"}}')
    for name in ("genai_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def fake_out(out: Path) -> Path:
    """Make an output folder with a GGUF file and an ONNX folder, and things that are not to be served."""
    for stage in ("gguf-q4", "onnx-int4", "merged"):
        (out / stage).mkdir(parents=True)
        (out / stage / "stage.json").write_text("{}")
    fake_gguf(out / "gguf-q4" / "a b.gguf")
    fake_onnx(out / "onnx-int4" / "a-int4")
    (out / "merged" / "model.safetensors").write_bytes(b"not for the page")
    (out / ".secret").write_text("not for the page")
    (out / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": {}}))
    return out


@contextlib.contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run ``mka-export serve`` on a free port; yield its process and the first URL it prints."""
    command = [sys.executable, "-c", MAIN, "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()
