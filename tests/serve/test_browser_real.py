"""The page in headless Chromium: real models, the same words as in the runtimes that measured them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from click.testing import CliRunner
from page import fake_gguf, serving
from ties import require_same_or_a_tie

from mka_export.cli import main
from mka_export.models.text import sample_prompts
from mka_export.parity.runtimes.genai_runtime import GenaiRuntime
from mka_export.parity.runtimes.llama_cpp_runtime import LlamaCppRuntime
from mka_export.parity.runtimes.onnx_runtime import OnnxRuntime
from mka_export.progress import Progress
from mka_export.serve.artifacts import find_artifacts
from mka_export.serve.scripts import set_up

pytestmark = pytest.mark.real
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = (390, 844)

Talk = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def browser() -> str:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"there is none of {', '.join(BROWSERS)}")
    return found


@pytest.fixture(scope="module")
def screenshots() -> Path:
    """Where they stay after the tests."""
    default = Path(tempfile.gettempdir()) / "mka-export-screenshots"
    folder = Path(os.environ.get("MKA_TEST_SCREENSHOTS") or default)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"screenshots: {folder}")
    return folder


@pytest.fixture(scope="module")
def cache(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's scripts, as npm brings them."""
    folder = tmp_path_factory.mktemp("cache")
    set_up(folder, Progress(quiet=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MKA_EXPORT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def talk(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Talk:
    folder = tmp_path_factory.mktemp("driver") / "browser"
    shutil.copytree(Path(__file__).parent / "browser", folder)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit"], cwd=folder, check=True, capture_output=True)

    def ask(url: str, model: str, said: list[tuple[str, str, int]], **wishes: object) -> dict[str, Any]:
        request = {"browser": browser, "url": url, "model": model, "said": said, **wishes}
        command = ["node", "talk.mjs", json.dumps(request, default=str)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        assert found["elsewhere"] == []
        for run in found["runs"]:
            speed, first = run["tokensPerSecond"] or 0, run["firstSeconds"]
            print(
                f"{run['kind']}, {run['threads']} threads: loaded in {run['loadSeconds']:.1f} s, first token after "
                f"{first:.1f} s, then {speed:.2f} tokens/s: {run['text'][:60]!r}"
            )
        return found

    return ask


@pytest.fixture(scope="module")
def out(four_bits: tuple[Path, object], real_smollm2: Path) -> Path:
    """An output folder with int4 ONNX and a Q4_K_M GGUF."""
    folder = four_bits[0].parent.parent
    small = ["--imatrix", "none", "--windows", "2", "--window-tokens", "16", "--quiet"]
    arguments = ["convert", real_smollm2, "--to", "gguf-q4", "--out", folder, *small]
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code in (0, 3, 4), result.output  # so few windows decide nothing
    return folder


@pytest.fixture(scope="module")
def url(out: Path, cache: Path) -> Iterator[str]:
    with serving(out) as (_, url):
        yield url


def test_onnx_says_what_onnxruntime_genai_does(url, out, talk, screenshots):
    folder = next(artifact for artifact in find_artifacts(out) if artifact.kind == "onnx").files["config.json"].parent
    prompts, tokens = sample_prompts()[:3], 16
    said = [("text", prompt, tokens) for prompt in prompts]
    found = talk(url, folder.name, said, threads=1, screenshot=screenshots / "onnx")
    assert (found["error"], found["errors"], found["notice"]) == (None, [], None)
    assert found["facts"].startswith("ONNX Runtime ")
    genai, runtime = GenaiRuntime(folder), OnnxRuntime(folder)
    for prompt, run, answer in zip(prompts, found["runs"], found["answers"], strict=True):
        ids = genai.tokenize(prompt)
        require_same_or_a_tie(runtime, ids, run["ids"], genai.generate([ids], tokens)[0])
        assert run["ids"]
        assert answer == prompt + run["text"]


def test_gguf_says_what_llama_cpp_does(url, out, talk, screenshots):
    (path,) = next(artifact for artifact in find_artifacts(out) if artifact.kind == "gguf").files.values()
    prompts, tokens = sample_prompts(), 24
    said = [("text", prompt, tokens) for prompt in prompts]
    found = talk(url, path.name, said, threads=1, screenshot=screenshots / "gguf")
    assert (found["error"], found["errors"], found["notice"]) == (None, [], None)
    assert found["facts"].startswith("llama.cpp ")
    runtime = LlamaCppRuntime(path)
    for prompt, run, answer in zip(prompts, found["runs"], found["answers"], strict=True):
        ids = runtime.tokenize(prompt)
        require_same_or_a_tie(runtime, ids, run["ids"], runtime.generate([ids], tokens)[0])
        assert run["ids"]
        assert answer == prompt + run["text"]


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_chat_on_a_phone(kind, url, out, talk, screenshots):
    name = next(artifact.name for artifact in find_artifacts(out) if artifact.kind == kind)
    said = [("chat", "Who are you?", 12), ("chat", "And who made you?", 12)]
    found = talk(url, name, said, viewport=PHONE, screenshot=screenshots / f"{kind}-phone")
    assert (found["error"], found["errors"]) == (None, [])
    assert "SmolLM" in found["answers"][0]
    assert len(found["answers"]) == 2


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_stop(kind, url, out, talk, screenshots):
    name = next(artifact.name for artifact in find_artifacts(out) if artifact.kind == kind)
    wishes = {"stopAfter": 6000, "threads": 1, "dark": True, "viewport": PHONE}
    found = talk(url, name, [("text", "1 2 3 4", 1000)], screenshot=screenshots / f"{kind}-dark", **wishes)
    assert found["error"] is None
    (run,) = found["runs"]
    assert run["stopped"]
    assert 0 < len(run["ids"]) < 1000


def elsewhere() -> str:
    """An address of this machine that is not the loopback's."""
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                return each.address
    pytest.skip("this machine has no address but the loopback's")


@pytest.mark.parametrize("tls", [False, True])
def test_from_another_device(tls, out, cache, talk):
    address = elsewhere()
    (path,) = next(artifact for artifact in find_artifacts(out) if artifact.kind == "gguf").files.values()
    with serving(out, "--host", address, *(["--tls"] if tls else [])) as (_, url):
        assert urlsplit(url)[:1] == ("https" if tls else "http",)
        found = talk(url, path.name, [("text", "The capital of France is", 4)], viewport=PHONE)
    assert (found["error"], found["isolated"]) == (None, tls)
    assert "Paris" in found["answers"][0]
    assert (found["notice"] is None) == tls
    if not tls:
        assert found["notice"].startswith("One thread, files are fetched again at each visit: ")
        assert found["runs"][0]["threads"] == 1


def test_a_file_that_is_no_model_is_one_line(cache, talk, tmp_path):
    path = fake_gguf(tmp_path / "broken.gguf")
    with serving(path) as (_, url):
        found = talk(url, path.name, [("text", "Hello", 4)])
    assert found["runs"] == []
    assert found["error"]
    assert "\n" not in found["error"]
