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
from command import type_in
from exact import with_exact_activations
from page import fake_gguf, serving
from ties import NEAR, require_same_or_a_tie
from transformers import AutoTokenizer

from mka_export.models.text import sample_prompts
from mka_export.parity.runtimes.genai_runtime import GenaiRuntime
from mka_export.parity.runtimes.llama_cpp_runtime import LlamaCppRuntime
from mka_export.parity.runtimes.onnx_runtime import OnnxRuntime
from mka_export.progress import Progress
from mka_export.serve.artifacts import find_artifacts
from mka_export.serve.scripts import set_up

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
MISSING = [program for program in ("node", "npm") if not shutil.which(program)] + ["Chromium"] * (BROWSER is None)
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=f"there is no {', no '.join(MISSING)}")]
PHONE = (390, 844)
TWO = min(2, os.cpu_count() or 1)  # threads
ENDINGS = {"onnx": "onnx-int4", "gguf": "gguf-q4"}

Talk = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def screenshots() -> Path:
    """Where they stay after the tests."""
    default = Path(tempfile.gettempdir()) / "mka-export-screenshots"
    folder = Path(os.environ.get("MKA_TEST_SCREENSHOTS") or default)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"screenshots: {folder}")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's scripts, as npm brings them."""
    folder = tmp_path_factory.mktemp("cache")
    set_up(folder, Progress(quiet=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MKA_EXPORT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Talk:
    folder = tmp_path_factory.mktemp("driver") / "browser"
    shutil.copytree(Path(__file__).parent / "browser", folder)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit"], cwd=folder, check=True, capture_output=True)

    def ask(url: str, model: str, said: list[tuple[str, str, int]], **wishes: object) -> dict[str, Any]:
        request = {"browser": BROWSER, "url": url, "model": model, "said": said, **wishes}
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
    """An output folder with int4 ONNX, and GGUF in Q4_K_M and F16."""
    folder = four_bits[0].parent.parent
    small = ["--imatrix", "none", "--windows", "2", "--window-tokens", "16", "--quiet"]
    arguments = ["convert", real_smollm2, "--to", "gguf-q4", "--to", "gguf-f16", "--out", folder, *small]
    result = type_in(*arguments)
    assert result.exit_code in (0, 3, 4), result.output  # so few windows decide nothing
    return folder


@pytest.fixture(scope="module")
def url(out: Path, cache: Path) -> Iterator[str]:
    with serving(out) as (_, url):
        yield url


@pytest.fixture(scope="module")
def exact(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int4 folder, computing as a browser does."""
    (found,) = (artifact for artifact in find_artifacts(out) if artifact.kind == "onnx")
    return with_exact_activations(found.files["config.json"].parent, tmp_path_factory.mktemp("exact") / "folder")


def test_onnx_says_what_onnxruntime_genai_does(url, out, exact, talk, screenshots):
    folder = next(artifact for artifact in find_artifacts(out) if artifact.kind == "onnx").files["config.json"].parent
    prompts, tokens = sample_prompts()[:3], 16
    said = [("text", prompt, tokens) for prompt in prompts]
    found = talk(url, folder.name, said, threads=1, screenshot=screenshots / "onnx")
    assert (found["error"], found["errors"], found["notice"]) == (None, [], None)
    assert found["facts"].startswith("ONNX Runtime ")
    genai, runtime = GenaiRuntime(exact), OnnxRuntime(exact)
    for prompt, run, answer in zip(prompts, found["runs"], found["answers"], strict=True):
        ids = genai.tokenize(prompt)
        require_same_or_a_tie(runtime, ids, run["ids"], genai.generate([ids], tokens)[0])
        assert run["ids"]
        assert answer == prompt + run["text"]


# Where weights are of Q4_0, Q5_0 or Q8_0, llama.cpp rounds what they are multiplied by to 8 bits, and in WebAssembly it
# truncates (quantize_row_q8_0 in ggml/src/ggml-cpu/arch/wasm/quants.c). 81 % of SmolLM2's Q4_K_M are of these.
@pytest.mark.parametrize(
    ("target", "count", "tokens", "near"), [("gguf-f16", 2, 8, NEAR), ("gguf-q4", 4, 24, 0.2)], ids=["f16", "q4_k_m"]
)
def test_gguf_says_what_llama_cpp_does(target, count, tokens, near, url, out, talk, screenshots):
    (path,) = next(artifact for artifact in find_artifacts(out) if artifact.target == target).files.values()
    prompts = sample_prompts()[:count]
    said = [("text", prompt, tokens) for prompt in prompts]
    found = talk(url, path.name, said, threads=1, screenshot=screenshots / target)
    assert (found["error"], found["errors"], found["notice"]) == (None, [], None)
    assert found["facts"].startswith("llama.cpp ")
    runtime = LlamaCppRuntime(path)
    for prompt, run, answer in zip(prompts, found["runs"], found["answers"], strict=True):
        ids = runtime.tokenize(prompt)
        require_same_or_a_tie(runtime, ids, run["ids"], runtime.generate([ids], tokens)[0], near)
        assert run["ids"]
        assert answer == prompt + run["text"]


def test_gguf_in_a_browser_without_new_webassembly(url, out, talk):
    """As Safari is: wllama has another build for it, which must come from here, too."""
    (path,) = next(artifact for artifact in find_artifacts(out) if artifact.target == "gguf-q4").files.values()
    found = talk(url, path.name, [("text", "The capital of France is", 4)], threads=1, older=True)
    assert (found["error"], found["errors"]) == (None, [])
    assert any("wllama-compat.wasm" in each for each in found["fetched"])
    assert "Paris" in found["answers"][0]


def test_a_second_visit_fetches_no_model_again(url, out, talk):
    for target in ENDINGS.values():
        artifact = next(artifact for artifact in find_artifacts(out) if artifact.target == target)
        found = talk(url, artifact.name, [("text", "The capital of France is", 1)], visits=2)
        assert (found["error"], found["errors"]) == (None, [])
        weights = [each for each in found["fetched"] if each.endswith((".gguf", ".onnx", ".onnx_data"))]
        assert len(weights) == len(set(weights)) > 0


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_chat_on_a_phone(kind, url, out, exact, talk, screenshots):
    name = next(artifact.name for artifact in find_artifacts(out) if artifact.target.endswith(ENDINGS[kind]))
    said = [("chat", "Who are you?", 12), ("chat", "And who made you?", 12)]
    found = talk(url, name, said, viewport=PHONE, threads=TWO, screenshot=screenshots / f"{kind}-phone")
    assert (found["error"], found["errors"]) == (None, [])
    assert len(found["answers"]) == 2
    message = [{"role": "user", "content": "Who are you?"}]
    text = AutoTokenizer.from_pretrained(exact).apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    (path,) = next(artifact for artifact in find_artifacts(out) if artifact.target == "gguf-q4").files.values()
    runtime, near = (OnnxRuntime(exact), NEAR) if kind == "onnx" else (LlamaCppRuntime(path), 0.2)
    ids = runtime.tokenize(text)
    require_same_or_a_tie(runtime, ids, found["runs"][0]["ids"], runtime.generate([ids], 12)[0], near)


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_stop(kind, url, out, talk, screenshots):
    name = next(artifact.name for artifact in find_artifacts(out) if artifact.target.endswith(ENDINGS[kind]))
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
def test_from_another_device(tls, out, cache, talk, screenshots):
    address = elsewhere()
    (path,) = next(artifact for artifact in find_artifacts(out) if artifact.target == "gguf-q4").files.values()
    with serving(out, "--host", address, *(["--tls"] if tls else [])) as (_, url):
        assert urlsplit(url).scheme == ("https" if tls else "http")
        wishes = {"threads": TWO} if tls else {}
        said = [("text", "The capital of France is", 4)]
        found = talk(url, path.name, said, viewport=PHONE, screenshot=screenshots / f"tls-{tls}", **wishes)
    assert (found["error"], found["isolated"]) == (None, tls)
    assert found["runs"][0]["threads"] == (TWO if tls else 1)
    assert "Paris" in found["answers"][0]
    assert (found["notice"] is None) == tls
    if not tls:
        assert found["notice"].startswith("No shared memory: one thread. No store: files are fetched again ")


def test_a_text_that_is_too_long_is_one_line(url, out, talk):
    name = next(artifact.name for artifact in find_artifacts(out) if artifact.target == "gguf-q4")
    found = talk(url, name, [("text", "much " * 3000, 4), ("text", "The capital of France is", 4)], threads=1)
    assert found["error"] == "That is too long: conversation and answer have 2048 tokens together."


def test_a_file_that_is_no_model_is_one_line(cache, talk, tmp_path):
    path = fake_gguf(tmp_path / "broken.gguf")
    with serving(path) as (_, url):
        found = talk(url, path.name, [("text", "Hello", 4)])
    assert found["runs"] == []
    assert found["error"].startswith("llama.cpp cannot load it: gguf_init")
    assert "\n" not in found["error"]


def test_a_server_that_is_gone_is_one_line(cache, talk, tmp_path):
    path = fake_gguf(tmp_path / "gone.gguf")
    with serving(path) as (process, url):
        found = talk(url, path.name, [], endServer=process.pid)
    assert (found["runs"], "\n" in found["error"]) == ([], False)
    assert found["error"].startswith("The server does not answer")
