"""Does an artifact behave? Looked at on files that do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from pico import CHAT_TEMPLATE
from safetensors.torch import load_file, save_file

from mka_export.models import chat
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.text import load_text, sample_conversations
from mka_export.parity.runtimes import open_runtime
from mka_export.parity.runtimes.isolated import IsolatedRuntime
from mka_export.parity.runtimes.llama_cpp_runtime import LlamaCppRuntime
from mka_export.parity.runtimes.torch_runtime import TorchRuntime
from mka_export.parity.smoke import SmokeCheck, check_chat_template, check_ends, repetition, smoke

Write = Callable[..., Path]
ORDINARY = np.array([[10, 11, 300], [12, 301, 10]])
PASSED = SmokeCheck("chat_template", "pass", "as it should"), SmokeCheck("end_of_text", "pass", "as it should")


@pytest.fixture(scope="module")
def original(pico_llama: Path) -> TorchRuntime:
    return TorchRuntime(pico_llama)


def changed(folder: Path, to: Path, **config: object) -> TorchRuntime:
    """Copy a checkpoint; ``config`` goes into tokenizer_config.json, or into generation_config.json if it names ends."""
    shutil.copytree(folder, to)
    (to / "chat_template.jinja").unlink()
    file = to / ("generation_config.json" if "eos_token_id" in config else "tokenizer_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return TorchRuntime(to)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render the original's templates in this process, which is sooner."""
    monkeypatch.setattr(f"{TorchRuntime.__module__}.render_apart", lambda _what, *args: chat.render(*args))


def templates(original: TorchRuntime, file: Path) -> SmokeCheck:
    with closing(LlamaCppRuntime(file, threads=1)) as artifact:
        return check_chat_template(original, artifact, sample_conversations())


def test_the_same_template_passes(original: TorchRuntime, pico_gguf: Path, here: None) -> None:
    check = templates(original, pico_gguf)
    assert (check.name, check.verdict) == ("chat_template", "pass")
    assert check.reason.startswith("The artifact's chat template renders 4 conversations as the original's does")


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SPOILT = {
    "a turn's role is lost": (
        CHAT_TEMPLATE.replace("{{ message['role'] }}", "user"),
        "its chat template makes '<|im_start|>user\\nYou answer",
    ),
    "a line end is lost": (CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>"), "the original's '"),
    "no prompt for the answer": (CHAT_TEMPLATE.partition("{% if")[0], "the original's '"),
    "refuses": (CHAT_TEMPLATE + "{{ raise_exception('no\nthanks') }}", "cannot render it (TemplateError: no thanks)"),
    "is no template": ("{% for %}", "cannot render it (TemplateSyntaxError: "),
    "names what is not there": ("{{ nobody.name.is }}", "cannot render it (UndefinedError: "),
    "runs code": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "cannot render it (SecurityError: "),
    "changes what it is given": ("{{ messages.append(1) }}", "cannot render it (SecurityError: "),
    "too much": ("{{ range(10**9) | list }}", "cannot render it (OverflowError: "),
    "none": ("", "The artifact has no chat template, and the original has one."),
}


@pytest.mark.parametrize("how", SPOILT)
def test_another_template_fails_in_one_line(
    how: str, original: TorchRuntime, gguf_like: Write, tmp_path: Path, here: None
) -> None:
    template, reason = SPOILT[how]
    check = templates(original, gguf_like(tmp_path / "spoilt.gguf", chat_template=template))
    assert check.verdict == "fail"
    assert reason in check.reason
    assert "\n" not in check.reason


def test_a_template_that_never_ends_is_given_up(
    original: TorchRuntime, gguf_like: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    monkeypatch.setattr(f"{IsolatedRuntime.__module__}.PATIENCE", 1.0)
    file = gguf_like(tmp_path / "endless.gguf", chat_template=LOOP)
    with closing(open_runtime("llama.cpp", file)) as artifact:
        check = check_chat_template(original, artifact, sample_conversations())
    assert check.verdict == "fail"
    assert "no sign of life for 1 seconds" in check.reason


def test_an_original_whose_template_never_ends_leaves_it_open(
    pico_llama: Path, pico_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "PATIENCE", 1.0)
    check = templates(changed(pico_llama, tmp_path / "endless", chat_template=LOOP), pico_gguf)
    assert check.verdict == "inconclusive"
    assert "The original's own chat template cannot be used" in check.reason


def test_the_same_text_of_other_ids_fails(original: TorchRuntime, gguf_like: Write, tmp_path: Path, here: None) -> None:
    """A vocabulary in which the mark of a turn is no special token."""
    check = templates(original, gguf_like(tmp_path / "plain.gguf", special=()))
    assert check.verdict == "fail"
    assert "differ at position" in check.reason


def test_without_a_template_there_is_nothing_to_compare(
    pico_llama: Path, pico_gguf: Path, tmp_path: Path, here: None
) -> None:
    check = templates(changed(pico_llama, tmp_path / "plain", chat_template=None), pico_gguf)
    assert (check.verdict, check.reason) == (
        "pass",
        "The original has no chat template, so there is nothing to compare.",
    )


def test_conversations_that_the_original_refuses_are_left_out(
    pico_llama: Path, gguf_like: Write, tmp_path: Path, here: None
) -> None:
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    original = changed(pico_llama, tmp_path / "strict", chat_template=no_system)
    check = templates(original, gguf_like(tmp_path / "strict.gguf", chat_template=no_system))
    assert check.verdict == "pass"
    assert "renders 2 conversations" in check.reason


def test_an_original_whose_own_template_is_broken_leaves_it_open(
    pico_llama: Path, pico_gguf: Path, tmp_path: Path, here: None
) -> None:
    original = changed(pico_llama, tmp_path / "broken", chat_template="{{ messages.append(1) }}")
    check = templates(original, pico_gguf)
    assert check.verdict == "inconclusive"
    assert "SecurityError" in check.reason


def test_of_several_templates_the_default_counts(pico_llama: Path, pico_gguf: Path, tmp_path: Path, here: None) -> None:
    several = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": CHAT_TEMPLATE}]
    assert templates(changed(pico_llama, tmp_path / "several", chat_template=several), pico_gguf).verdict == "pass"


def test_special_tokens_are_those_of_the_file(pico_llama: Path, gguf_like: Write, tmp_path: Path, here: None) -> None:
    template = "{{ bos_token }}" + CHAT_TEMPLATE + "{{ eos_token }}"
    original = changed(pico_llama, tmp_path / "special", chat_template=template)
    assert templates(original, gguf_like(tmp_path / "same.gguf", chat_template=template)).verdict == "pass"
    other = templates(original, gguf_like(tmp_path / "other.gguf", chat_template=template, eos=0))
    assert other.verdict == "fail"
    assert "<|endoftext|>', the original's" in other.reason


def test_ends_are_what_ships_in_the_file(gguf_like: Write, tmp_path: Path, original: TorchRuntime) -> None:
    assert original.ends == {2}
    for eos, expected in ((2, {0, 2}), (300, {0, 2, 300})):  # llama.cpp knows two of them by their spelling
        with closing(LlamaCppRuntime(gguf_like(tmp_path / f"{eos}.gguf", eos=eos))) as runtime:
            assert runtime.ends == expected


def test_the_same_ends_pass_and_more_of_them_too(original: TorchRuntime) -> None:
    for ends in ({2}, {0, 2}):
        check = check_ends(original, frozenset(ends), ORDINARY)
        assert (check.verdict, check.reason) == (
            "pass",
            "The artifact stops where the original does, at 2 ('<|im_end|>').",
        )


def test_an_end_that_is_lost_fails(pico_llama: Path, tmp_path: Path) -> None:
    original = changed(pico_llama, tmp_path / "two", eos_token_id=[2, 1, 9999])  # the last is no token
    check = check_ends(original, frozenset({2, 0}), ORDINARY)
    assert check.verdict == "fail"
    assert check.reason == "The artifact does not stop at 1 ('<|im_start|>'), which ends a text of the original."


def test_an_end_in_the_middle_of_text_fails(original: TorchRuntime) -> None:
    check = check_ends(original, frozenset({2, 301}), ORDINARY)
    assert check.verdict == "fail"
    assert check.reason.startswith("The artifact stops at 301 (")
    assert check_ends(original, frozenset({2, 302}), ORDINARY).verdict == "pass"


def test_an_original_without_ends(original: TorchRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(original, "ends", frozenset())
    assert "names no end" in check_ends(original, frozenset({2}), ORDINARY).reason


@pytest.mark.parametrize(
    ("ids", "rate"),
    [
        ([], 0),
        ([1, 2, 3], 0),
        ([1, 2, 3, 4], 0),
        (list(range(40)), 0),
        ([7] * 5, 1 / 2),
        ([7] * 13, 9 / 10),
        ([1, 2, 3, 4, 5] * 2, 1 - 5 / 7),
        ([1, 1, 2, 1, 1, 2, 1], 1 - 3 / 4),
    ],
)
def test_repetition_by_hand(ids: list[int], rate: float) -> None:
    assert repetition(ids) == pytest.approx(rate)


RNG = np.random.default_rng(3)
FREE = [RNG.integers(3, 600, 32).tolist() for _ in range(12)]
LOOPS = [row[:4] * 8 for row in FREE]


def test_what_loops_fails_and_what_the_original_does_too_passes() -> None:
    looping = smoke(*PASSED, FREE, LOOPS)
    assert (looping.original, looping.artifact) == (0, pytest.approx(25 / 29))
    check = looping.checks[2]
    assert (check.name, check.verdict) == ("repetition", "fail")
    assert looping.failures == [check.reason]
    assert "clearly more than" in check.reason
    assert "0.862" in check.reason
    for one, other in ((LOOPS, LOOPS), (FREE, FREE), (LOOPS, FREE)):
        same = smoke(*PASSED, one, other)
        assert same.to_dict()["verdict"] == "pass"
        assert same.failures == []


def test_some_loops_leave_it_open_and_do_not_fail() -> None:
    some = smoke(*PASSED, FREE, [*LOOPS[:4], *FREE[4:]])
    assert some.checks[2].verdict == "inconclusive"
    assert (some.to_dict()["verdict"], some.failures) == ("inconclusive", [])


def test_few_prompts_decide_nothing() -> None:
    few = smoke(*PASSED, FREE[:3], LOOPS[:3])
    assert few.checks[2].verdict == "inconclusive"
    assert "no interval" in few.checks[2].reason


def test_a_model_whose_layers_do_nothing_goes_round_in_circles(
    original: TorchRuntime, pico_llama: Path, gguf_like: Write, tmp_path: Path
) -> None:
    """What comes next then hangs on the last token alone."""
    folder = tmp_path / "idle"
    shutil.copytree(pico_llama, folder)
    weights = load_file(folder / "model.safetensors")
    idle = {
        n: torch.zeros_like(t) if n.endswith(("o_proj.weight", "down_proj.weight")) else t for n, t in weights.items()
    }
    save_file(idle, folder / "model.safetensors", {"format": "pt"})
    text = original.tokenize(load_text("evaluation", None).text[:4000])
    prompts, written = [text[i : i + 8] for i in range(0, 480, 40)], [text[i + 8 : i + 40] for i in range(0, 480, 40)]
    file = gguf_like(tmp_path / "idle.gguf", checkpoint=Checkpoint.open(folder))
    with closing(LlamaCppRuntime(file, threads=1)) as artifact:
        result = smoke(*PASSED, written, artifact.generate(prompts, 32))
    assert result.original < 0.1
    assert result.artifact > 0.8
    assert result.checks[2].verdict == "fail"


def test_the_original_is_rendered_in_a_process_of_its_own(
    original: TorchRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "render", pytest.fail)  # here
    (rendered,) = original.render_chats([[{"role": "user", "content": "a"}]]) or []
    assert rendered.text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
