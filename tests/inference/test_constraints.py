"""Answers held to a JSON schema or a regular expression: every answer of a random network is one."""

import collections
import dataclasses
import functools
import itertools
import json
import re
import sys
import threading
from typing import Any

import hypothesis
import jax
import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inference.ahead import sent_ahead
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.inference import constraints
from deepseek_jax.inference.answers import Completion
from deepseek_jax.inference.constraints import Constraint, Grammars, check_multiples
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh

MODEL = dataclasses.replace(SPEAKER, max_position_embeddings=512)
SERVING = ServingConfig(slots=4, pages=4 * 32, page=8, context=256, chunk=16, turns=3)
LONG = SamplingParams(max_tokens=200)
EOS = tokenizer().eos_id
more = dataclasses.replace


def made(serving: ServingConfig = SERVING, mesh: jax.sharding.Mesh | None = None) -> Engine:
    return Engine(whole(MODEL, *weights(MODEL), tokenizer(), mesh), serving=serving)


@functools.cache
def engine() -> Engine:
    ready = made()
    ready.warm_up()
    return ready


def ask(engine: Engine, *params: SamplingParams) -> list[Completion]:
    answers = [answer for (answer,) in engine.answer(["def"] * len(params), params)]
    assert engine.metrics()["pages_held"] == 0 and not engine.busy
    return answers


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Such as a short answer has room for."""
    leaf = st.sampled_from(
        [
            {"type": "integer", "minimum": -3, "maximum": 120},
            {"type": "string", "maxLength": 3},
            {"type": "string", "pattern": "^[a-c]{1,3}$"},
            {"type": "boolean"},
            {"const": {"x": [1, "é🙂"]}},
            {"enum": ["a", 1, None]},
            {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
        ]
    )

    def around(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        fields = st.dictionaries(st.sampled_from(["a", "b", "é"]), inner, min_size=1, max_size=3)
        closed = {"type": "object", "additionalProperties": False}
        needed = fields.map(lambda each: closed | {"properties": each, "required": [*each][:2]})
        array = st.builds(
            lambda each, most: {"type": "array", "items": each, "maxItems": most}, inner, st.integers(0, 2)
        )
        return needed | array | st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some})

    return st.recursive(leaf, around, max_leaves=4)


def test_every_answer_is_json_of_its_schema():
    """Drawn in different ways side by side, beside one that is held to nothing; what is cut off says so."""
    ways: list[dict[str, Any]] = [{}, {"temperature": 2.0, "top_k": 20}, {"presence_penalty": 1.0, "min_p": 0.01}]
    reasons = collections.Counter[str]()

    @hypothesis.settings(max_examples=12)
    @given(some=st.lists(schemas(), min_size=3, max_size=3), seed=st.integers(0, 1000))
    def check(some, seed):
        asked = zip(some, ways, strict=True)
        params = [more(LONG, seed=seed, json_schema=json.dumps(schema), **way) for schema, way in asked]
        *answers, free = ask(engine(), *params, more(LONG, max_tokens=9))
        assert len(free.token_ids) == 9 or free.finish_reason == "stop"
        for answer, schema in zip(answers, some, strict=True):
            reasons[answer.finish_reason] += 1
            if answer.finish_reason == "stop":
                assert answer.token_ids.index(EOS) == len(answer.token_ids) - 1 == len(answer.logprobs) - 1
                jsonschema.validate(json.loads(answer.text), schema)
            else:
                assert answer.finish_reason == "length" and len(answer.token_ids) == 200

    check()
    assert reasons["stop"] > 9 * reasons["length"]
    assert engine().metrics()["compiles"] == 0


@pytest.mark.parametrize(
    "pattern",
    [
        "a*b",
        "(ab|cd){2,5}",
        r"[0-9]{3}-\s+x",
        "é🙂[α-ω]{1,9}你",
        "[^a-z]{20}",
        r"\{(\"[a-z]+\": [0-9]{1,2},){0,3}\}",
        "a|bc|",
    ],
)
def test_every_answer_is_the_expression_from_end_to_end(pattern):
    params = [more(LONG, seed=seed, regex=pattern, temperature=0.5 * seed) for seed in range(4)]
    for answer in ask(engine(), *params):
        if answer.finish_reason == "stop":
            assert re.fullmatch(pattern, answer.text), answer.text
        else:
            assert len(answer.token_ids) == 200 and pattern in ("a*b", r"[0-9]{3}-\s+x")


def test_an_answer_ends_where_it_may_and_must():
    """Whoever wants to end at once does as soon as it is enough, whoever wants never to when no more may follow."""
    eager, never = (more(LONG, regex="[ab]{2,5}", logit_bias=((EOS, bias),)) for bias in (1e3, -1e3))
    first, last = ask(engine(), eager, never)
    assert len(first.text) == 2 and len(last.text) == 5
    assert first.token_ids[-1] == last.token_ids[-1] == EOS and first.finish_reason == last.finish_reason == "stop"
    (any_json,) = ask(engine(), more(LONG, json_schema="{}", seed=2, logit_bias=((EOS, 1e3),)))
    json.loads(any_json.text)
    (cut,) = ask(engine(), more(LONG, regex="a{50}", max_tokens=7))
    assert cut.finish_reason == "length" and re.fullmatch("a+", cut.text)
    (stopped,) = ask(engine(), more(LONG, regex="a{50}", stop=("aaaaa",)))
    assert stopped.finish_reason == "stop" and stopped.text == ""


def test_no_text_holds_a_special_token():
    """Not even one that is shown, as ``<think>`` is, however much it is wanted."""
    wanted = tuple((i, 1e3) for i in tokenizer().added_ids if i != EOS)
    (answer,) = ask(engine(), more(LONG, regex="(.|\n){40}", logit_bias=wanted))
    assert not set(answer.token_ids[:-1]) & set(tokenizer().added_ids) and answer.finish_reason == "stop"


def test_log_probabilities_are_the_networks_own():
    """What the grammar leaves no choice has no probability of 1."""
    (answer,) = ask(engine(), more(LONG, regex="a{5}", temperature=0.0))
    ids = [tokenizer().bos_id, *tokenizer().encode("def"), *answer.token_ids[:-1]]
    forced = [
        more(LONG, max_tokens=1, logit_bias=((token, 1e6),)) for token in answer.token_ids
    ]  # the same tokens, by a push instead
    prompts = [ids[: len(ids) - len(forced) + 1 + i] for i in range(len(forced))]
    pushed = [each.logprobs[0] for (each,) in engine().answer(prompts, forced)]
    assert answer.logprobs == pytest.approx(pushed, abs=1e-4) and max(answer.logprobs) < -0.1


def test_samples_of_one_grammar_differ_and_are_those_of_whoever_is_alone():
    params = more(LONG, json_schema='{"type": "string", "minLength": 8, "maxLength": 9}', seed=4)
    (several,) = engine().answer(["def"], [params], n=6)
    (alone,) = ask(engine(), params)
    assert several[0].text == alone.text and len({answer.text for answer in several}) == 6
    assert all(8 <= len(json.loads(answer.text)) <= 9 for answer in several)


@pytest.mark.parametrize("ahead", [False, True])
def test_each_step_has_a_token_of_an_answer_while_a_prompt_is_read_in(ahead, monkeypatch):
    monkeypatch.setattr(constraints, "GRACE", 60.0)
    ready = sent_ahead(made()) if ahead else made()
    held, counts = ready.submit("def", more(LONG, regex="([ab]c[0-9]){60}")), list[int]()
    while not ready.step():
        pass
    long = ready.submit([3] * 240, more(LONG, max_tokens=2))
    while (events := ready.step()) and long not in [event.number for event in events]:
        counts.append(sum(len(event.token_ids) for event in events if event.number == held))
    assert len(counts) >= 14 and set(counts[1:]) == {1}
    ready.cancel(held)
    while ready.busy:
        ready.step()


def test_who_gives_way_goes_on_where_the_answer_was(monkeypatch):
    """Pages for two of four; and a step that was interrupted is done again."""
    params = [more(LONG, regex="([ab]c[0-9]){25}", seed=seed) for seed in range(4)]
    expected = [answer.text for answer in ask(engine(), *params)]
    scarce, steps = made(more(SERVING, pages=33)), itertools.count()
    decode = scarce.requests.continuous.programs.decode

    def now_and_then(*given: Any) -> Any:
        if next(steps) % 40 == 10:
            raise KeyboardInterrupt
        return decode(*given)

    monkeypatch.setattr(scarce.requests.continuous.programs, "decode", now_and_then)
    numbers = [scarce.submit("def", each) for each in params]
    found = dict.fromkeys(numbers, "")
    while scarce.busy:
        try:
            for event in scarce.step():
                found[event.number] += tokenizer().decode([i for i in event.token_ids if i != EOS])
        except KeyboardInterrupt:
            pass
    assert scarce.metrics()["preemptions"] and [*found.values()] == expected
    assert all(re.fullmatch("([ab]c[0-9]){25}", text) for text in expected)


def test_a_slow_grammar_delays_nobody_else(monkeypatch):
    """Another's whole answer comes while it looks for its second token."""
    find, serving, enough = Constraint.find, engine(), threading.Event()

    def slowly(self: Constraint, ids: list[int]) -> None:
        assert not ids or enough.wait(60)
        find(self, ids)

    monkeypatch.setattr(Constraint, "find", slowly)
    slow = serving.submit("def", more(LONG, regex="a{2}"))
    other = serving.submit("def", more(LONG, max_tokens=40, logit_bias=((EOS, -1e3),)))
    tokens, behind = collections.Counter[int](), 0
    while serving.busy:
        for event in serving.step():
            tokens[event.number] += len(event.token_ids)
            if event.number == other and event.finish_reason:
                behind = tokens[slow]
                enough.set()
    assert tokens == {slow: 3, other: 40} and behind == 1


def test_a_grammar_that_becomes_too_much_ends_its_answer_alone():
    """Of 800 properties each may come next: more than llguidance's limit, which it sees behind the first brace."""
    fields = {f"k{i}": {"type": "string", "pattern": f"^[a-z]{{1,{i + 1}}}$"} for i in range(800)}
    schema = json.dumps({"type": "object", "properties": fields, "additionalProperties": False})
    failed, other = ask(engine(), more(LONG, json_schema=schema), more(LONG, max_tokens=30, logit_bias=((EOS, -1e3),)))
    assert failed.finish_reason == "error" and len(other.token_ids) == 30
    serving = engine()
    number = serving.submit("def", more(LONG, json_schema=schema))
    events = [event for _ in range(400) if serving.busy for event in serving.step()]
    assert events[-1].number == number and "Current row has" in events[-1].error


@pytest.mark.parametrize(
    "json_schema, message",
    [
        ('{"type": "foo"}', "Invalid type: foo"),
        ('{"type": "object"', "Expecting"),
        ("[1]", "Expecting object schema"),
        ("false", "Expecting object schema"),
        ('{"anyOf": []}', "Unsatisfiable schema: anyOf is empty"),
        ('{"allOf": [{"type": "string"}, {"type": "integer"}]}', "Unsatisfiable schema: incompatible types"),
        ('{"type": "string", "pattern": "("}', "unclosed group"),
        ('{"$ref": "http://example.com/x.json"}', "does not fetch resources"),
        ('{"$ref": "#/$defs/x"}', "Pointer '/\\$defs/x' does not exist"),
        ('{"not": {}}', 'Unimplemented keys: \\["not"\\]'),
        ("[" * 50_000, "recursion"),
        ('{"x": ' * 500 + "1" + "}" * 500, "recursion"),
        ('{"type": "integer", "multipleOf": 1000003}', "multipleOf of 1000003 take more than 20000 states"),
        ('{"allOf": [{"multipleOf": 331}, {"\\u006dultipleOf": 0.07}]}', "multipleOf of 331, 0.07 take more"),
        ('{"type": "integer", "multipleOf": 1e400000000}', "Overflow"),
        ('{"type": "integer", "multipleOf": 1e40}', "multipleOf of 1E\\+40 take more"),
        ('{"type": "integer", "multipleOf": 3, "multipleOf": 1e-30}', "multipleOf of 3, 1E-30 take more"),
    ],
)
def test_a_schema_that_cannot_be_met_is_refused(json_schema, message):
    with pytest.raises(ValueError, match=f"(?s)json_schema.*{message}"):
        engine().submit("def", SamplingParams(json_schema=json_schema))
    assert not engine().busy


def test_a_grammar_that_fails_ends_its_answer_alone(monkeypatch):
    def fails(self: Constraint, ids: list[int]) -> None:
        raise RuntimeError("a defect")

    engine().held_to(params := more(LONG, regex="b{9}"))  # compiled before
    monkeypatch.setattr(Constraint, "find", fails)
    failed, other = ask(engine(), params, more(LONG, max_tokens=9, logit_bias=((EOS, -1e3),)))
    assert failed.finish_reason == "error" and failed.text == "b" and len(other.token_ids) == 9


@pytest.mark.parametrize(
    "regex, message",
    [("(", "unclosed group"), ("\ud800", "surrogates"), ("a(?=b)", "look-around"), (r"[^\s\S]", "NoExt")],
)
def test_an_expression_that_cannot_be_met_is_refused(regex, message):
    with pytest.raises(ValueError, match=f"(?s)regex='.*{message}"):
        engine().submit("def", SamplingParams(regex=regex))


def test_multiples_that_are_few_are_none_to_refuse():
    for steps in ([0.01, 5, 10, 100], [1e-10], [7, 14, 0.5], [12345], []):
        check_multiples(json.dumps({"allOf": [{"multipleOf": step} for step in steps]}))


def test_what_makes_no_sense_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="json_schema, regex: expected one of them"):
        SamplingParams(json_schema="{}", regex="a")
    with pytest.raises(ValueError, match="json_schema, regex: 65537 characters, expected at most 65536"):
        SamplingParams(regex="a" * 65_537)
    with pytest.raises(ValueError, match="regex=a: for requests by Engine.answer and submit alone"):
        engine().generate(["def"], SamplingParams(regex="a"))
    with pytest.raises(ValueError, match="vocab_size=200 has no room for all 294 ids"):
        Grammars(tokenizer(), 200)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"needs llguidance: pip install 'deepseek-jax\[constrained\]'"):
        Grammars(tokenizer(), 300)


def test_on_a_mesh_each_row_has_its_own_grammar():
    serving = made(more(SERVING, slots=2), make_mesh(MeshConfig(data=2), devices=jax.devices()[:2]))
    expected = ask(engine(), *(params := [more(LONG, regex=f"[{a}]{{3,9}}") for a in "abc"]), more(LONG, max_tokens=9))
    found = ask(serving, *params, more(LONG, max_tokens=9))
    assert [answer.text for answer in found] == [answer.text for answer in expected]


def test_drafts_change_nothing():
    """Those of a row that is held to a grammar are not taken over; the others' are."""
    params = [*(more(LONG, regex=f"([{a}]c[0-9]){{1,9}}") for a in ("ab", "d")), more(LONG, max_tokens=9)]
    plain, drafted = (ask(made(more(SERVING, drafts=drafts)), *params) for drafts in (0, 2))
    assert [answer.token_ids for answer in drafted] == [answer.token_ids for answer in plain]
