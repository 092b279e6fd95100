"""``/v1/completions`` with ``echo`` and ``logprobs``: what lm-eval's ``local-completions`` asks, and what it makes of
the answers, against the forward pass of ``likelihoods``."""

import dataclasses
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from model.tiny import weights, whole
from serve.engine import NETWORK, SERVING, Running, running
from serve.fake import FakeAsker, fake_app
from small import tokenizer
from starlette.testclient import TestClient

from deepseek_jax.data.special_tokens import BOS
from deepseek_jax.evals.likelihood import Pair, likelihoods, windows

TEXT = tokenizer()
# A context and a continuation each, some of several chunks, some with a prefix that is in the cache by then.
QUESTIONS = [
    ("12+34", "=46"),
    ("12+34", "=47"),
    ("def add(a, b):\n    return" * 5, " a + b\n"),
    ("7*8=5" * 9, "6, 12+34=46"),
]
PAIRS: list[Pair] = [([TEXT.bos_id, *TEXT.encode(before)], TEXT.encode(behind)) for before, behind in QUESTIONS]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(serving=dataclasses.replace(SERVING, score=True)) as made:
        yield made


def asked(server: Running, prompts: Any, **more: Any) -> dict[str, Any]:
    """By the body that lm-eval 0.4.13 sends."""
    body = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    content = json.dumps(body | {"echo": True} | more).encode()
    request = urllib.request.Request(f"{server.http.url}/v1/completions", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def read(choice: dict[str, Any], context: int) -> tuple[float, bool]:
    """As lm-eval reads a choice: the tokens behind the context but the last one, which was generated."""
    told = [choice["logprobs"][name][context:-1] for name in ("token_logprobs", "top_logprobs")]
    return sum(told[0]), all(one == max(top.values()) for one, top in zip(*told, strict=True))


def assert_likelihoods(server: Running, pairs: list[Pair]) -> None:
    expected = likelihoods(whole(NETWORK, *weights(NETWORK), TEXT), pairs)
    for at in range(0, len(pairs), 3):
        some = pairs[at : at + 3]
        choices = asked(server, [[*before, *behind] for before, behind in some])["choices"]
        assert [choice["index"] for choice in choices] == [*range(len(some))]
        for choice, (before, behind), (logprob, greedy) in zip(choices, some, expected[at:], strict=False):
            found = read(choice, len(before))
            assert found[0] == pytest.approx(logprob, abs=1e-4 * len(behind)) and found[1] == greedy
    server.idle()
    assert server.engine.metrics()["compiles"] == 0


def test_multiple_choice(server):
    """Likely continuations too, which are told to be so."""
    (answered,) = server.engine.generate([PAIRS[0][0]])
    assert_likelihoods(server, [*PAIRS, (PAIRS[0][0], answered.token_ids[:3])])


def test_perplexity(server):
    """A text in windows of the context, as lm-eval's rolling ones."""
    ids = TEXT.encode("def add(a, b):\n    return a + b\n12+34=46, 7*8=56\n" * 12)
    assert len(ids) > 200
    assert_likelihoods(server, windows(ids, TEXT.bos_id, 100))


def test_there_is_an_entry_for_each_token_whatever_ends_the_answer(server):
    """The end of sentence too, or the last of the prompt's would be taken for what was generated."""
    (before, behind), end = PAIRS[0], {str(TEXT.eos_id): 100}
    plain, ended = (asked(server, [[*before, *behind]], logit_bias=bias, max_tokens=1) for bias in ({}, end))
    assert ended["choices"][0]["finish_reason"] == "stop"
    for found in (plain, ended):
        assert found["usage"]["total_tokens"] == len(before) + len(behind) + 1
        assert {len(told) for told in found["choices"][0]["logprobs"].values()} == {len(before) + len(behind) + 1}
    assert read(plain["choices"][0], len(before)) == read(ended["choices"][0], len(before))


def test_texts_alone_and_in_pieces(server):
    """``max_tokens: 0``: the prompt alone; whole, or in chunks, with the place of each token in the text."""
    text = "def add(a, b):\n    return é"
    (choice,) = asked(server, text, max_tokens=0, logprobs=2)["choices"]
    assert choice["text"] == text and choice["finish_reason"] == "length"
    told = choice["logprobs"]
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None and told["tokens"][0] == BOS
    assert len(told["tokens"]) == 1 + len(TEXT.encode(text)) and all(len(top) <= 2 for top in told["top_logprobs"][1:])
    for token, offset in zip(told["tokens"][1:], told["text_offset"][1:], strict=True):
        assert token == text[offset : offset + len(token)] or "\ufffd" in token
    with server.client() as client:
        options: dict[str, Any] = {"model": "tiny", "prompt": text, "echo": True, "logprobs": 2, "temperature": 0}
        whole_answer = client.completions.create(**options, max_tokens=9, n=2).choices
        chunks = [*client.completions.create(**options, max_tokens=9, n=2, stream=True)]
    for index, answer in enumerate(whole_answer):
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(part.text for part in parts) == answer.text and answer.text.startswith(text)
        assert parts[0].text.startswith(text) and answer.logprobs is not None
        offsets = [offset for part in parts if part.logprobs for offset in part.logprobs.text_offset or ()]
        assert offsets == answer.logprobs.text_offset and offsets == sorted(offsets)
        assert offsets[len(told["tokens"])] == len(text)


def test_a_server_without_scores_says_so():
    with running() as plain, plain.client() as client, pytest.raises(openai.BadRequestError, match="--serving.score"):
        client.completions.create(model="tiny", prompt="12", echo=True, logprobs=1)


def test_the_prompt_alone_is_no_work_for_the_engine():
    asker = FakeAsker()
    client = TestClient(fake_app(asker))
    answer = client.post("/v1/completions", json={"prompt": "12+3", "echo": True, "max_tokens": 0}).json()
    assert answer["choices"][0] == {"index": 0, "text": "12+3", "logprobs": None, "finish_reason": "length"}
    assert not asker.asked and answer["usage"]["completion_tokens"] == 0
    refused = client.post("/v1/completions", json={"prompt": "12+3", "max_tokens": 0})
    assert refused.status_code == 400 and "max_tokens=0 without echo" in refused.text


@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_what_comes_at_once_changes_nothing(at_once):
    """A first character of two tokens among it, whose first one brings the prompt's scores and no text."""
    asker = FakeAsker("é12", at_once=at_once)
    body = {"prompt": [5, 9, 11], "echo": True, "logprobs": 1, "max_tokens": 20}
    told = TestClient(fake_app(asker)).post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert told["token_logprobs"] == [None, -1 / 8, -2 / 8, *[-0.5] * len(asker.answer)]
    assert [*told["top_logprobs"][2].values()] == [-2 / 8] and told["text_offset"][0] == 0
