"""Both runtimes against plain transformers, on the same pico model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mka_export.errors import RuntimeFailure, UsageError
from mka_export.models.text import even_windows, tokenizer_corpus
from mka_export.parity.comparison import measure
from mka_export.parity.runtimes import Prefixed, Runtime, open_runtime
from mka_export.parity.runtimes.llama_cpp_runtime import LlamaCppRuntime, log_softmax
from mka_export.parity.runtimes.torch_runtime import TorchRuntime
from mka_export.parity.tokenizer_check import first_difference
from mka_export.parity.verdict import judge
from mka_export.target import Limits


@pytest.fixture(scope="module")
def llama(pico_gguf: Path) -> Iterator[LlamaCppRuntime]:
    runtime = LlamaCppRuntime(pico_gguf, threads=1)
    yield runtime
    runtime.close()


@pytest.fixture(scope="module")
def torch_runtime(pico_llama: Path) -> TorchRuntime:
    return TorchRuntime(pico_llama)


@pytest.fixture(params=["llama", "torch_runtime"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    found: Runtime = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def model(pico_llama: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows(torch_runtime: TorchRuntime) -> np.ndarray:
    ids = [i for text in tokenizer_corpus()[:40] for i in torch_runtime.tokenize(text)]
    return even_windows(ids, 5, 200, None, "test")  # longer than one batch of logits, and no multiple of it


@torch.no_grad()
def test_log_probs_are_those_of_transformers(runtime: Runtime, model: torch.nn.Module, windows: np.ndarray) -> None:
    found = list(runtime.log_probs(windows))
    expected = torch.log_softmax(model(torch.from_numpy(windows)).logits, dim=-1).numpy()
    assert [part.shape for part in found] == [(200, runtime.vocab_size)] * 5
    assert all(part.dtype == np.float32 for part in found)
    # llama.cpp keeps keys and values in float16.
    tolerance = 1e-4 if runtime.name == "torch" else 2e-2
    np.testing.assert_allclose(np.stack(found), expected, atol=tolerance)
    np.testing.assert_allclose(np.exp(np.stack(found)).sum(-1), 1, atol=1e-4)


def test_windows_do_not_see_each_other_and_runs_repeat(runtime: Runtime, windows: np.ndarray) -> None:
    forwards = list(runtime.log_probs(windows))
    backwards = list(runtime.log_probs(windows[::-1].copy()))[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_shorter_then_a_longer_window_get_contexts_of_their_own(llama: LlamaCppRuntime, windows: np.ndarray) -> None:
    whole = next(llama.log_probs(windows[:1]))
    part = next(llama.log_probs(windows[:1, :50]))
    longer = next(llama.log_probs(windows[:2].reshape(1, -1)))
    np.testing.assert_allclose(part, whole[:50], atol=1e-2)
    np.testing.assert_allclose(longer[:200], whole, atol=1e-2)


@torch.no_grad()
def test_generation_is_greedy(runtime: Runtime, model: torch.nn.Module, windows: np.ndarray) -> None:
    prompts = [windows[0, :9].tolist(), windows[1, :30].tolist(), windows[2, :1].tolist()]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 12:
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == 2:  # the end of a turn, in config and tokenizer
                break
            ids.append(token)
        expected.append(ids[len(prompt) :])
    assert runtime.generate(prompts, 12) == expected


def test_drafts_save_passes_and_change_nothing(torch_runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    run = torch_runtime._runner.hidden_states
    monkeypatch.setattr(torch_runtime._runner, "hidden_states", lambda ids: passes.append(1) or run(ids))

    def generated(drafts: list[list[int]] | None) -> tuple[list[list[int]], int]:
        passes.clear()
        return torch_runtime.generate(prompts, 12, drafts), len(passes)

    prompts = [torch_runtime.tokenize("The harbour was"), torch_runtime.tokenize("One two three"), [7]]
    expected, _ = generated(None)
    longest = max(len(ids) + (len(ids) < 12) for ids in expected)  # an end takes a pass too
    assert generated(None) == (expected, longest)
    assert generated(expected) == (expected, 1)
    assert generated([[*ids[:5], (ids[5] + 1) % 600, *ids[6:]] for ids in expected]) == (expected, 2)
    assert generated([[3] * 20, [], [10**9]]) == (expected, longest)


def test_generation_stops_at_an_end_token(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = runtime.tokenize("The harbour was")
    (free,) = runtime.generate([prompt], 6)
    end = free[3]
    monkeypatch.setattr(runtime, "ends", {end})
    other = runtime.tokenize("One two three")
    stopped, _ = runtime.generate([prompt, other], 6)
    assert stopped == free[: free.index(end)]


def test_torch_ends_at_any_id_that_config_names(pico_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico_llama, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert TorchRuntime(folder).ends == {2, 7}


def test_an_empty_prompt_is_refused(runtime: Runtime) -> None:
    with pytest.raises(RuntimeFailure, match="no tokens"):
        runtime.generate([[]], 3)


def test_both_read_text_alike(llama: LlamaCppRuntime, torch_runtime: TorchRuntime) -> None:
    texts = [*tokenizer_corpus(), "a<|im_start|>user\nb<|im_end|>", "", "nul\0byte"]
    assert first_difference(torch_runtime, llama, texts) is None
    assert llama.tokenize("<|im_start|>x")[0] == 1  # special tokens are read, BOS is not added
    assert llama.tokenize("x")[0] != 1


def test_text_comes_back(runtime: Runtime) -> None:
    for text in tokenizer_corpus():
        assert runtime.detokenize(runtime.tokenize(text)) == text
    assert runtime.detokenize(runtime.tokenize("<|im_start|>user")) == "<|im_start|>user"
    assert runtime.detokenize([]) == ""


def test_the_same_weights_pass_and_diverge_by_rounding_only(
    llama: LlamaCppRuntime, torch_runtime: TorchRuntime, windows: np.ndarray
) -> None:
    comparison = measure(llama, torch_runtime, {}, windows)
    conversion = comparison.differences["conversion"]
    assert conversion.mean_kl.value < 1e-3
    assert conversion.top1.value > 0.99
    assert judge(comparison, Limits(max_mean_kl=1e-3, min_top1=0.99), Limits()).outcome == "pass"


def test_an_id_beyond_the_vocabulary_is_refused(llama: LlamaCppRuntime) -> None:
    with pytest.raises(RuntimeFailure, match="640"):
        next(llama.log_probs(np.array([[1, 640]])))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "bad magic": lambda data: b"NOPE" + data[4:],
    "version 99": lambda data: data[:4] + b"\x63\0\0\0" + data[8:],
    "cut in half": lambda data: data[: len(data) // 2],
    "cut in the header": lambda data: data[:100],
    "huge tensor count": lambda data: data[:8] + b"\xff" * 8 + data[16:],
    "huge key count": lambda data: data[:16] + b"\xff" * 7 + b"\x0f" + data[24:],
    "no tensors": lambda data: data[:8] + b"\0" * 8 + data[16:],
    "tensor misnamed": lambda data: data.replace(b"blk.3.ffn_up.weight", b"blk.3.ffn_xx.weight"),
    "unknown architecture": lambda data: data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lxama"),
    "unknown pre-tokenizer": lambda data: data.replace(b"\x06\0\0\0\0\0\0\0smollm", b"\x06\0\0\0\0\0\0\0smxllm"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_a_failure_that_says_why(
    kind: str, pico_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = pico_gguf.read_bytes()
    damaged = tmp_path / "bad.gguf"
    damaged.write_bytes(DAMAGE[kind](data))
    assert damaged.read_bytes() != data
    with pytest.raises(RuntimeFailure, match=r"bad\.gguf") as caught:
        LlamaCppRuntime(damaged)
    assert len(caught.value.what) > len(f"llama.cpp: cannot load {damaged}: ")  # what the library said
    assert capfd.readouterr() == ("", "")  # and it said it nowhere else


def test_a_missing_file_or_a_folder_is_a_failure(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(RuntimeFailure, match="not a file"):
            LlamaCppRuntime(path)


def test_nan_weights_are_found_when_the_file_is_opened(pico_gguf: Path, tmp_path: Path) -> None:
    data = bytearray(pico_gguf.read_bytes())
    data[-64:-60] = np.float32("nan").tobytes()
    bad = tmp_path / "nan.gguf"
    bad.write_bytes(data)
    with pytest.raises(RuntimeFailure, match=r"nan\.gguf"):
        LlamaCppRuntime(bad)


def test_log_softmax_is_stable() -> None:
    logits = np.array([[1e4, 1e4, -1e4], [-1e30, 0.0, 1.0], [3.0, 3.0, 3.0]], dtype=np.float32)
    log_softmax(logits)
    np.testing.assert_allclose(logits[0, :2], -np.log(2), rtol=1e-6)
    np.testing.assert_allclose(logits[1, 1:], [-1.3132617, -0.3132617], rtol=1e-6)
    np.testing.assert_allclose(logits[2], -np.log(3), rtol=1e-6)
    assert np.isfinite(logits).all()


def test_unknown_runtime_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean llama.cpp"):
        open_runtime("llamacpp", Path("x"))


@pytest.mark.real
def test_a_real_gguf_predicts_its_text(real_smollm2: Path) -> None:
    runtime = open_runtime("llama.cpp", real_smollm2)
    texts = tokenizer_corpus()
    for text in texts:
        assert runtime.detokenize(runtime.tokenize(text)) == text
    (new,) = runtime.generate([runtime.tokenize("The capital of France is")], 3)
    assert "Paris" in runtime.detokenize(new)
    runtime.close()


@pytest.fixture(scope="module")
def texts(torch_runtime: TorchRuntime) -> list[Prefixed]:
    ids = tuple(i for text in tokenizer_corpus()[:40] for i in torch_runtime.tokenize(text))
    return [
        Prefixed(ids[:150], tuple(ids[150 + 5 * n : 160 + 12 * n] for n in range(40))),  # more than go through together
        Prefixed((), (ids[:7], ids[7:90])),
        Prefixed(ids[:5], (ids[5:6],)),
    ]


@torch.no_grad()
def test_tokens_after_texts_that_begin_alike_are_as_likely_as_by_transformers(
    runtime: Runtime, model: torch.nn.Module, texts: list[Prefixed]
) -> None:
    found = np.concatenate(list(runtime.next_log_probs(texts, [5, 9, 4])))
    rows = [torch.tensor([[*text.prefix, *rest]]) for text in texts for rest in text.rests]
    expected = torch.cat([torch.log_softmax(model(row).logits[:, -1], dim=-1)[:, [5, 9, 4]] for row in rows]).numpy()
    assert found.shape == expected.shape == (43, 3)
    np.testing.assert_allclose(found, expected, atol=1e-4 if runtime.name == "torch" else 2e-2)


@torch.no_grad()
def test_how_texts_that_begin_alike_go_on_is_as_likely_as_by_transformers(
    runtime: Runtime, model: torch.nn.Module, texts: list[Prefixed]
) -> None:
    found = list(runtime.rest_log_probs(texts))
    rests = [(text.prefix, rest) for text in texts for rest in text.rests]
    assert [rows.shape for rows in found] == [(len(rest), runtime.vocab_size) for _, rest in rests]
    for (prefix, rest), rows in zip(rests, found, strict=True):
        expected = torch.log_softmax(model(torch.tensor([[*prefix, *rest]])).logits[0, len(prefix) :], dim=-1)
        np.testing.assert_allclose(rows, expected.numpy(), atol=1e-4 if runtime.name == "torch" else 3e-2)
