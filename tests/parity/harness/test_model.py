"""Our runtimes in lm-evaluation-harness, against its own backend for transformers on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from parity_fakes import FakeRuntime

from mka_export.errors import UnsupportedError
from mka_export.parity.harness.frame import Frame
from mka_export.parity.harness.model import RuntimeLM
from mka_export.parity.runtimes import Prefixed, open_runtime
from mka_export.progress import Progress

PAIRS = [
    ("Question: what is a whale?\nAnswer:", " a fish"),
    ("Question: what is a whale?\nAnswer:", " a mammal that lives in the sea, and breathes air"),
    ("Question: what is a whale?\nAnswer:", " no"),
    ("The first of May ", "was cold"),  # the space moves to the continuation
    ("", "It was a bright cold day in April"),  # predicted from BOS
    ("<|im_start|>user\nHello", " there"),
]
TEXTS = ["It was a bright cold day in April, and the clocks were striking thirteen.", "One. " * 200]
GREEDY = {"until": ["e", "th"], "max_gen_toks": 40, "do_sample": False}


def requests(kind, arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def theirs(pico_llama):
    return HFLM(pretrained=str(pico_llama), dtype="float32", batch_size=2, device="cpu")


@pytest.fixture(scope="module", params=["torch", "llama.cpp"])
def ours(request, pico_llama, pico_gguf, tmp_path_factory):
    path = pico_llama if request.param == "torch" else pico_gguf
    runtime = open_runtime(request.param, path)
    yield RuntimeLM(runtime, Frame.of(path), tmp_path_factory.mktemp("pieces"), Progress(quiet=True))
    runtime.close()


def test_log_likelihoods_are_those_of_the_harness_on_transformers(ours, theirs):
    expected, found = (model.loglikelihood(requests("loglikelihood", PAIRS)) for model in (theirs, ours))
    np.testing.assert_allclose([each[0] for each in found], [each[0] for each in expected], atol=2e-2)
    assert [each[1] for each in found] == [each[1] for each in expected]


def test_what_greedy_decoding_gives_is_said_to_be_greedy(ours):
    context = "Once upon a time"
    ids = ours._runtime.generate([ours.tok_encode(context)], 3)[0]
    text = ours._runtime.detokenize(ids)
    assert ours._loglikelihood_tokens([(None, ours.tok_encode(context), ids)])[0][1], text
    assert not ours._loglikelihood_tokens([(None, ours.tok_encode(context), [*ids[:-1], (ids[-1] + 1) % 600])])[0][1]


def test_rolling_log_likelihoods_are_those_of_the_harness_on_transformers(ours, theirs):
    assert len(ours.tok_encode(TEXTS[1])) > 512, "one text is longer than the context, and goes in pieces"
    instances = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected, found = (model.loglikelihood_rolling(instances) for model in (theirs, ours))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_generated_texts_are_those_of_the_harness_on_transformers(ours, theirs):
    contexts = ["Once upon a time", "The sea", "A long day " * 30]
    expected, found = (
        model.generate_until(requests("generate_until", [(text, dict(GREEDY)) for text in contexts]))
        for model in (theirs, ours)
    )
    assert found == expected
    assert not any(stop in text for text in found for stop in GREEDY["until"])


def test_a_context_and_continuation_longer_than_the_model_lose_their_beginning(ours, theirs):
    pair = [("A long day at the sea. " * 120, " It ended.")]
    assert len(ours.tok_encode(pair[0][0])) > 512
    ((expected, _),), ((found, _),) = (model.loglikelihood(requests("loglikelihood", pair)) for model in (theirs, ours))
    assert found == pytest.approx(expected, abs=2e-2)


def test_bos_stands_before_every_text_where_the_tokenizer_puts_one(tmp_path):
    words = ["<s>", "a", "b", "c"]
    model = RuntimeLM(FakeRuntime([0.1, 0.2, 0.3, 0.4], 4, words), Frame(0, 0, 16), tmp_path, Progress(quiet=True))
    assert model.tok_encode("a b") == [0, 1, 2]
    assert model.tok_encode("<s> a b") == [0, 1, 2]
    assert model.tok_encode("a b", add_special_tokens=False) == [1, 2]
    without = RuntimeLM(FakeRuntime([0.1, 0.2, 0.3, 0.4], 4, words), Frame(None, 0, 16), tmp_path, Progress(quiet=True))
    assert without.tok_encode("a b") == [1, 2]


class Counting(FakeRuntime):
    def __init__(self):
        super().__init__([0.1, 0.2, 0.3, 0.4], 4, ["<s>", "a", "b", "c"])
        self.read, self.asked = [], []

    def rest_log_probs(self, texts):
        self.read += texts
        return super().rest_log_probs(texts)

    def generate(self, prompts, max_new_tokens):
        self.asked.append(max_new_tokens)
        return [[3] * max_new_tokens for _ in prompts]


def test_what_choices_begin_with_is_read_once_and_letters_are_one_pass(tmp_path):
    runtime = Counting()
    model = RuntimeLM(runtime, Frame(None, 0, 16), tmp_path, Progress(quiet=True))
    letters = [(None, [1, 2], [answer]) for answer in range(4)]
    words = [(None, [3, 2, 1], [2, 2]), (None, [3, 2, 1], [3, 1, 3])]
    found = model._loglikelihood_tokens([*letters, *words, (None, [1], [])])
    assert runtime.read == [Prefixed((3, 2), ((1, 2), (1, 3, 1))), Prefixed((1,), ((2,),))]
    assert model.tokens == 7 + 2
    np.testing.assert_allclose([each[0] for each in found], np.log([0.1, 0.2, 0.3, 0.4, 0.09, 0.032, 1]), rtol=1e-5)
    assert [each[1] for each in found] == [False, False, False, True, False, False, True]


def test_generation_stops_soon_after_a_stop_string_and_at_the_limit(tmp_path):
    runtime = Counting()
    model = RuntimeLM(runtime, Frame(None, 0, 512), tmp_path, Progress(quiet=True))
    (found,) = model.generate_until(requests("generate_until", [("a", {"until": ["c c"], "max_gen_toks": 256})]))
    assert (found, runtime.asked) == ("", [16])
    (found,) = model.generate_until(requests("generate_until", [("a", {"until": ["b"], "max_gen_toks": 50})]))
    assert (found.split(), sum(runtime.asked[1:])) == (["c"] * 50, 50)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "samples"),
        ({"max_gen_toks": 512}, "up to 512 tokens, and the model's context has 512"),
    ],
)
def test_generation_that_cannot_be_done_is_refused(settings, message, tmp_path):
    model = RuntimeLM(Counting(), Frame(None, 0, 512), tmp_path, Progress(quiet=True))
    with pytest.raises(UnsupportedError, match=message):
        model.generate_until(requests("generate_until", [("a", settings)]))


def test_what_a_killed_run_has_answered_is_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("mka_export.parity.harness.model.PIECE", 2)
    asked = [(None, [n, 1], [2, 3, n, 1]) for n in range(4)] + [(None, [n], [3]) for n in range(3)]
    written = requests("generate_until", [(word, {"until": ["b"], "max_gen_toks": 3}) for word in ("a", "b", "c")])

    def answers(runtime, pieces):
        model = RuntimeLM(runtime, Frame(None, 0, 512), pieces, Progress(quiet=True))
        return model._loglikelihood_tokens(asked), model.generate_until(written)

    class Killed(Counting):
        def rest_log_probs(self, texts):
            if len(self.read) == 4:
                raise KeyboardInterrupt
            return super().rest_log_probs(texts)

    whole, killed, rest, again = Counting(), Killed(), Counting(), Counting()
    (tmp_path / "whole").mkdir()
    (tmp_path / "pieces").mkdir()
    expected = answers(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        answers(killed, tmp_path / "pieces")
    assert answers(rest, tmp_path / "pieces") == expected
    assert [*killed.read, *rest.read] == whole.read
    assert (len(rest.asked), expected[1]) == (3, ["c c c"] * 3)
    assert answers(again, tmp_path / "pieces") == expected
    assert (again.read, again.asked) == ([], [])
