"""The lm-eval adapter: with the harness itself where it is installed, else with a stand-in of its two names."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.evals.likelihood import likelihoods
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams

MODEL = whole(SPEAKER, *weights(SPEAKER), tokenizer())
HARNESS = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture(scope="module")
def adapter():
    if not HARNESS:
        named = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
        hook = types.SimpleNamespace(add_partial=lambda *given: None)
        vars(named["lm_eval.api.model"])["LM"] = type("LM", (), {"cache_hook": hook})
        registry = types.ModuleType("lm_eval.api.registry")
        vars(registry)["register_model"] = lambda name: lambda kind: kind
        sys.modules.update(named | {"lm_eval.api.registry": registry})
    from deepseek_jax.evals.lm_eval import LMEval

    yield LMEval
    if not HARNESS:
        for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
            del sys.modules[name]


def asked(*arguments):
    return [types.SimpleNamespace(args=given) for given in arguments]


def test_likelihoods_of_texts(adapter):
    text = tokenizer()
    requests = [("12+34", "=46"), ("def add", "(a, b):\n"), ("", "7*8"), ("12+ ", "34"), ("7", "")]
    bos = text.bos_ids
    pairs = [
        ([*bos, *text.encode("12+34")], text.encode("12+34=46")[len(text.encode("12+34")) :]),
        ([*bos, *text.encode("def add")], text.encode("def add(a, b):\n")[len(text.encode("def add")) :]),
        (bos, text.encode("7*8")),
        ([*bos, *text.encode("12+")], text.encode("12+ 34")[len(text.encode("12+")) :]),  # the space is the number's
        ([*bos, *text.encode("7")], []),
    ]
    found = adapter(MODEL, batch_size=3).loglikelihood(asked(*requests))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in likelihoods(MODEL, pairs)]
    np.testing.assert_allclose([n for n, _ in found], [n for n, _ in likelihoods(MODEL, pairs)], rtol=1e-5)

    long = "def add(a, b):\n    return a + b\n" * 12
    ids = text.encode(long)
    assert len(ids) > 2 * SPEAKER.max_position_embeddings
    whole_text, empty = adapter(MODEL).loglikelihood_rolling(asked((long,), ("",)))
    one_by_one = [([*bos, *ids][max(n - 63, 0) : n + 1], [i]) for n, i in enumerate(ids[:64])]
    each = [logprob for logprob, _ in likelihoods(MODEL, one_by_one)]
    assert adapter(MODEL).loglikelihood_rolling(asked((text.decode(ids[:64]),)))[0] == pytest.approx(
        sum(each), rel=1e-5
    )
    assert empty == 0.0 and whole_text < sum(each)


def test_answers_end_before_what_ends_them(adapter, monkeypatch):
    from deepseek_jax.evals import until

    monkeypatch.setattr(until, "_FIRST", 4)  # so that an answer is put together from parts
    prompt, room = "12+34=", 24
    greedy = SamplingParams(temperature=0.0, max_tokens=room)
    said = tokenizer().decode(Engine(MODEL).generate([prompt], greedy)[0].token_ids)
    inside = said[7:9]
    settings = [
        {"until": [], "max_gen_toks": room},
        {"until": inside, "max_gen_toks": room, "do_sample": False, "temperature": 1.0},
        {"until": ["never", said[-1:], inside], "max_gen_toks": room, "temperature": 0.0},
        {"until": ["never"], "max_gen_toks": 6},
        {"until": [], "max_gen_toks": room, "do_sample": True, "temperature": 1.0},
        {"until": [], "max_gen_toks": room, "do_sample": True, "temperature": 1.0},
    ]
    found = adapter(MODEL, batch_size=2).generate_until(asked(*((prompt, given) for given in settings)))
    assert found[:2] == [said, said[: said.index(inside)]]
    assert found[2] == said[: min(said.index(inside), said.index(said[-1:]))]
    assert said.startswith(found[3]) and len(found[3]) < len(said)
    assert len({said, *found[4:]}) == 3
    with pytest.raises(ValueError, match="max_gen_toks=64: must be less than max_position_embeddings=64"):
        adapter(MODEL).generate_until(asked((prompt, {"max_gen_toks": 64})))


def test_thinking_is_left_out_and_not_searched(adapter, monkeypatch):
    monkeypatch.setattr(
        Engine, "generate_ids", lambda self, prompts, sampling: types.SimpleNamespace(**made(len(prompts)))
    )
    text = tokenizer()
    ids = [text.think_id, *text.encode("a\n\nb"), text.end_think_id, *text.encode("\n\n7\n\n8"), text.eos_id]

    def made(rows):
        return {
            "tokens_BN": np.array([ids] * rows),
            "lengths_B": np.array([len(ids)] * rows),
            "stopped_B": np.array([True] * rows),
        }

    settings = ({"until": ["8", "b"], "max_gen_toks": 40}, {"max_gen_toks": 40})
    found = adapter(MODEL).generate_until(asked(*(("1", given) for given in settings)))
    assert found == ["7\n\n", "7\n\n8"]


def test_chats_by_the_models_template(adapter):
    model = adapter(MODEL)
    chat = [{"role": "user", "content": "1+1?"}]
    text = model.apply_chat_template(chat)
    assert text.endswith("1+1?<｜Assistant｜>")
    answer = {"role": "assistant", "content": "So"}
    assert model.apply_chat_template([*chat, answer], add_generation_prompt=False) == text + "So"
    assert model.chat_template(True) and not model.chat_template(False) and model.tokenizer_name
    assert model._context(text)[:2] == [tokenizer().bos_id, tokenizer().user_id]  # one BOS, and special tokens as such
    with pytest.raises(ValueError, match="chat_template='other'"):
        model.chat_template("other")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give a model, or the path of one"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"dtype": "x"}, "model_args dtype: expected path"),
    ],
)
def test_what_makes_no_sense_is_refused(adapter, given, message):
    with pytest.raises(ValueError, match=message):
        adapter(*([MODEL] if given else []), **given)


@pytest.mark.skipif(not HARNESS, reason="lm-eval (the extra lm-eval) is not installed")
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_the_harness_runs_a_task(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import lm_eval  # pyright: ignore[reportMissingImports]

    rows = [{"q": f"{a}+{a}=", "options": [str(2 * a), str(a), "x"], "right": 0} for a in range(10, 16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    choice = shared | {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }
    words = shared | {
        "task": "tiny_words",
        "output_type": "generate_until",
        "doc_to_target": "{{options[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    found = lm_eval.simple_evaluate(adapter(MODEL), tasks=[choice, words], bootstrap_iters=0, log_samples=True)
    model = adapter(MODEL)
    best = [
        np.argmax([n for n, _ in model.loglikelihood(asked(*((row["q"], one) for one in row["options"])))])
        for row in rows
    ]
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(np.mean(np.equal(best, 0)))
    said = model.generate_until(asked(*((row["q"], words["generation_kwargs"]) for row in rows)))
    assert [sample["resps"][0][0] for sample in found["samples"]["tiny_words"]] == said
