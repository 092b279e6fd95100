"""The engine: text in, text out, the same for a prompt by itself and in a batch."""

import concurrent.futures
import dataclasses
import gc

import jax
import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.inference import sampling_model, together
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.model import parameters
from deepseek_jax.parallel.mesh import make_mesh

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(parameters.merge(SPEAKER, *weights(SPEAKER)), tokenizer())


def test_text_is_completed_from_its_beginning(engine):
    """A text gets the begin-of-sentence token in front; ids are taken as they are."""
    prompt = "12+34="
    ids = [tokenizer().bos_id, *tokenizer().encode(prompt)]
    (by_text,), (by_ids,) = engine.generate([prompt], GREEDY), engine.generate([ids], GREEDY)
    assert by_text == by_ids
    logits = jax.jit(lambda p, b, x: parameters.merge(SPEAKER, p, b)(x).logits)
    row = np.zeros((1, 24), np.int32)
    row[0, : len(ids)] = ids
    assert by_text.token_ids[0] == int(np.argmax(logits(*weights(SPEAKER), jax.numpy.asarray(row))[0, len(ids) - 1]))
    assert len(by_text.token_ids) == len(by_text.logprobs) == 8 and by_text.finish_reason == "length"
    assert by_text.text == tokenizer().decode(by_text.token_ids, skip_special_tokens=False)


def test_a_batch_answers_each_prompt_as_by_itself(engine):
    prompts = ["def", "12+", "a"]
    together = engine.generate(prompts, GREEDY)
    assert [c.token_ids for c in together] == [engine.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    assert engine.generate([], GREEDY) == []


def test_an_answer_ends_with_its_stop_token(engine):
    (whole,) = engine.generate(["def"], GREEDY)
    stop = whole.token_ids[4]
    length = whole.token_ids.index(stop) + 1
    stopping = SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=(stop,))
    (answer,) = engine.generate(["def"], stopping)
    assert answer.finish_reason == "stop" and answer.token_ids == whole.token_ids[:length]
    assert answer.text == tokenizer().decode(whole.token_ids[: length - 1], skip_special_tokens=False)
    np.testing.assert_allclose(answer.logprobs, whole.logprobs[:length], atol=1e-5)


def test_the_end_of_sentence_stops(engine):
    """With the head's columns of the first answer token and the end of sentence swapped, the latter comes first."""
    first, eos = engine.generate(["def"], GREEDY)[0].token_ids[0], tokenizer().eos_id
    params, bias = weights(SPEAKER)
    w = params["head"]["w"].at[:, [first, eos]].set(params["head"]["w"][:, [eos, first]])
    other = Engine(whole(SPEAKER, params | {"head": {"w": w}}, bias, tokenizer()))
    (answer,) = other.generate(["def"], GREEDY)
    assert (answer.token_ids, answer.text, answer.finish_reason) == ([eos], "", "stop")


def test_a_seed_reproduces_its_answers(engine):
    sampled = [
        [c.token_ids for c in engine.generate(["def"] * 2, SamplingParams(max_tokens=8, seed=seed))]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert sampled[0][0] != sampled[0][1]


def test_a_prompt_with_its_own_seed_is_answered_the_same_in_any_company(engine):
    sampled = SamplingParams(max_tokens=8, seed=3)
    (alone,) = engine.generate(["def"], sampled)
    company = [GREEDY, dataclasses.replace(sampled, seed=4), sampled, dataclasses.replace(sampled, max_tokens=4)]
    together = engine.generate(["a", "def", "def", "def"], company)
    assert together[2].token_ids == alone.token_ids != together[1].token_ids
    assert together[3].token_ids == alone.token_ids[:4]
    np.testing.assert_allclose(together[2].logprobs, alone.logprobs, atol=1e-5)
    assert together[0].token_ids == engine.generate(["a"], GREEDY)[0].token_ids


def test_a_stream_joined_is_the_answer(engine, monkeypatch):
    """Drawn or greedy, ended by its limit or a stop token, in pieces of one token or of several."""
    drawn = SamplingParams(temperature=1.5, top_p=0.9, max_tokens=24, seed=3)
    stop = engine.generate(["def"], GREEDY)[0].token_ids[4]
    for sampling in (drawn, dataclasses.replace(GREEDY, stop_token_ids=(stop,)), SamplingParams(max_tokens=1)):
        (whole_answer,) = engine.generate(["def"], sampling)
        for seconds in (0.0, 1e9):
            monkeypatch.setattr(together, "STREAM_SECONDS", seconds)
            pieces = [*engine.stream("def", sampling)]
            assert "".join(piece.text for piece in pieces) == whole_answer.text
            assert sum((piece.token_ids for piece in pieces), []) == whole_answer.token_ids
            np.testing.assert_allclose(sum((p.logprobs for p in pieces), []), whole_answer.logprobs, atol=1e-5)
            assert [piece.finish_reason for piece in pieces] == [""] * (len(pieces) - 1) + [whole_answer.finish_reason]
            assert len(pieces) == (len(whole_answer.token_ids) if not seconds else min(2, len(whole_answer.token_ids)))
    with pytest.raises(ValueError, match="a prompt of 3 tokens and max_tokens=64 pass"):
        next(engine.stream([1, 2, 3], SamplingParams(max_tokens=64)))


def test_who_has_asked_nothing_has_no_cache():
    idle = Engine(parameters.merge(SPEAKER, *weights(SPEAKER)), tokenizer())
    idle.cancel(0)
    assert idle.metrics() == {} and not idle.busy


def test_weights_are_made_once_and_then_by_update_alone(monkeypatch):
    made = []
    original = sampling_model.sampling_weights
    monkeypatch.setattr(sampling_model, "sampling_weights", lambda *a, **k: made.append(1) or original(*a, **k))
    params, bias = weights(SPEAKER)
    engine = Engine(whole(SPEAKER, params, bias, tokenizer()))
    assert not made
    first = engine.generate(["def"], GREEDY)
    assert engine.generate(["def"], GREEDY) == first and len(made) == 1
    engine.update(params | {"embed": params["embed"][::-1]}, bias)
    other = engine.generate(["def"], GREEDY)
    assert other != first and engine.generate(["def"], GREEDY) == other and len(made) == 2
    engine.update(params, bias)
    assert engine.generate(["def"], GREEDY) == first


def test_new_weights_take_the_room_of_the_former(monkeypatch):
    """With a request running: while they are made the former ones are gone, and then all is as large as it was."""
    live = lambda: sum(array.nbytes for array in jax.live_arrays())  # noqa: E731
    original, held = sampling_model.sampling_weights, []
    monkeypatch.setattr(sampling_model, "sampling_weights", lambda *a, **k: held.append(live()) or original(*a, **k))
    params, bias = weights(SPEAKER)
    engine = Engine(
        whole(SPEAKER, params, bias, tokenizer()), serving=ServingConfig(slots=2, pages=8, page=4, chunk=8, turns=2)
    )
    engine.submit([5, 9, 2], GREEDY)
    engine.step()
    own = sum(array.nbytes for array in jax.tree.leaves(engine.model.weights()))
    gc.collect()
    before = live()
    engine.update(params, bias)
    assert engine.busy and own > 50_000 and held[-1] == before - own and live() == before


def test_any_thread_may_ask(engine):
    """``jax.set_mesh`` holds for the thread that entered it: the engine enters the mesh in each call."""
    expected = engine.generate(["def"], GREEDY)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: engine.generate(["def"], GREEDY), range(4)))
    assert found == [expected] * 4


def test_the_callers_mesh_may_be_another(engine):
    expected = engine.generate(["7", "12+"], GREEDY)
    with jax.set_mesh(make_mesh()):
        assert engine.generate(["7", "12+"], GREEDY) == expected


def test_on_eight_devices_each_holds_its_rows_and_the_answers_are_one_devices(engine):
    mesh = make_mesh()
    params, bias = jax.device_put(weights(SPEAKER), jax.NamedSharding(mesh, jax.P()))
    spread = Engine(whole(SPEAKER, params, bias, tokenizer(), mesh))
    prompts = [[1, 2, 3], [4], [5, 6]] * 3
    found, expected = (each.generate_ids(prompts, SamplingParams(max_tokens=8)) for each in (spread, engine))
    assert {shard.data.shape for shard in found.tokens_BN.addressable_shards} == {(2, 16)}
    np.testing.assert_array_equal(found.tokens_BN, expected.tokens_BN)
    assert len(spread.generate(["def"], GREEDY)) == 1  # fewer prompts than devices
    module_alone = Engine(parameters.merge(SPEAKER, params, bias), tokenizer())
    assert module_alone.mesh == mesh  # where its arrays lie


def test_what_cannot_be_answered_is_refused(engine):
    with pytest.raises(ValueError, match="prompts='7' is one text: give a list"):
        engine.generate("7", GREEDY)
    with pytest.raises(ValueError, match="prompt of 60 tokens and max_tokens=8 pass max_position_embeddings=64"):
        engine.generate([[1] * 60], GREEDY)
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        engine.generate([[1], []], GREEDY)
    with pytest.raises(ValueError, match="2 prompts, but 1 sampling parameters"):
        engine.generate([[1], [2]], [GREEDY])
    with pytest.raises(ValueError, match="stop_token_ids has the id 300: expected below vocab_size=300"):
        engine.generate([[1]], dataclasses.replace(GREEDY, stop_token_ids=(2, 300)))
    for ask in (engine.submit, lambda ids: engine.generate([ids], GREEDY), lambda ids: next(engine.stream(ids))):
        with pytest.raises(ValueError, match="a prompt has ids of type bool: expected ints"):
            ask([1, True])
    few = Engine(whole(dataclasses.replace(SPEAKER, vocab_size=40), *weights(SPEAKER), tokenizer()))
    with pytest.raises(ValueError, match="token 'a' has the id 67, and the model's vocab_size=40: .* has 294 ids"):
        few.generate(["a"], GREEDY)
    for wrong in (300, -1):
        with pytest.raises(ValueError, match=f"prompt 1 has the id {wrong}: .* vocab_size=300"):
            engine.generate([[1], [wrong]], GREEDY)
