"""A reward model from a language model's folder: what it learns, goes on with and says, and its scores as a reward."""

import dataclasses
import functools
import json
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax import load, save_hf
from deepseek_jax.data.preferences import encode_judged
from deepseek_jax.rl.asking import Answer
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.reward_spec import parse_reward
from deepseek_jax.rl.tasks import TaskConfig, make_task
from deepseek_jax.train.loop_config import LoopConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.workflows.reward_model import PreferenceData, RewardModelConfig, reward_model
from deepseek_jax.workflows.row_batches import LoaderBatches
from deepseek_jax.workflows.sft import SFTConfig, SFTData, sft

END = "</think>\n\n"


def pairs(path: Path, first: int, last: int, label: bool = False) -> str:
    """Shouting is better; the thought says the opposite of it."""
    rows = []
    for number in range(first, last):
        good, bad = f"<think>bad{END}{number}!", f"<think>good{END}{number}."
        if label:
            rows += [{"prompt": "n?", "response": text, "label": ok} for text, ok in ((good, "safe"), (bad, 0))]
        else:
            rows.append({"prompt": "n?", "chosen": good, "rejected": bad})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    save_hf(whole(SPEAKER, *weights(SPEAKER), tokenizer()), folder, dtype="float32")
    return folder


def config(base: Path, run: Path, **fields) -> RewardModelConfig:
    given = RewardModelConfig(
        run_dir=str(run),
        init_from=str(base),
        data=PreferenceData(
            path=(pairs(base.parent / "train.jsonl", 10, 60),),
            heldout=(pairs(base.parent / "held.jsonl", 60, 80),),
            seq_len=64,
        ),
        batch_size=8,
        epochs=4,
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=0, constant_until=1.0, cosine_until=1.0),
        loop=LoopConfig(steps=100, log_every=1, checkpoint_every=4, tensorboard=False),
        quiet=True,
    )
    return dataclasses.replace(given, **fields)


@pytest.fixture(scope="module")
def trained(base) -> tuple[Path, dict]:
    run = base.parent / "helpful"
    return run, reward_model(config(base, run))


def test_it_learns_held_out_preferences(trained):
    run, result = trained
    assert result["agreement"] > 0.9 and result["agreement_of"] == 20
    share = result["agreement"]
    assert result["agreement_stderr"] == pytest.approx((share * (1 - share) / 20) ** 0.5)
    model = load(run)
    assert model.config.num_labels == 1 and model.config.num_nextn_predict_layers == 0
    rows = json.loads((run / "rows" / "meta.json").read_text())
    assert rows["items"] == 50 and result["steps"] == -(-4 * rows["count"] // 8)


def test_it_goes_on_where_it_was_stopped_and_refuses_other_settings(trained, base, monkeypatch):
    run, result = trained
    other, following, calls = config(base, base.parent / "stopped"), LoaderBatches.next, iter(range(7))

    def broken(self, state):
        if next(calls) == 6:
            raise RuntimeError("pulled the plug")
        return following(self, state)

    monkeypatch.setattr(LoaderBatches, "next", broken)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        reward_model(other)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="judges.*is 'summary' there and 'all' here"):
        reward_model(dataclasses.replace(other, judges="all"))
    found = reward_model(other)
    assert (found["steps"], found["steps_here"]) == (result["steps"], result["steps"] - 4)
    jax.tree.map(np.testing.assert_array_equal, load(other.run_dir).params, load(run).params)


def test_single_labels_and_everything_judged(base):
    run = base.parent / "harmless"
    held = (pairs(base.parent / "single_held.jsonl", 60, 70, label=True),)
    data = PreferenceData(path=(pairs(base.parent / "single.jsonl", 10, 40, label=True),), heldout=held, seq_len=64)
    result = reward_model(config(base, run, data=data, judges="all"))
    assert result["agreement"] > 0.9 and result["agreement_of"] == 20
    # As a reward it reads all turns of an answer, and what was cut off.
    task, row = make_task(TaskConfig(name="rows", prompt="q", answer="a")), {"q": "n?", "a": None}
    turns = Answer("5.", True, ({"role": "assistant", "content": "bad!"}, {"role": "user", "content": "<result>7"}))
    cut = Answer("<think>go", False)
    with Grader((f"model:{run}",), task=task) as grader:
        whole = [turns.all_turns, cut.all_turns]
        found = grader.grade(["5.", "<think>go"], [row] * 2, ended=[True, False], whole=whole).rewards["model.harmless"]
        last = grader.grade(["5."], [row]).rewards["model.harmless"]
    wanted = [expected(run, "n?", text) for text in ("bad!\n<result>7\n5.", "<think>go")]
    assert found == pytest.approx(wanted, rel=1e-5) and last != pytest.approx(found[:1], rel=1e-3)


def test_it_goes_on_with_new_judgements_and_a_tenth_of_the_old(trained, base):
    """The head that it had stays, and of 18 new pairs and 50 old ones 20 are trained on."""
    new, old = pairs(base.parent / "new.jsonl", 80, 98), trained[0].parent / "train.jsonl"
    data = PreferenceData(path=(new,), replay=(str(old),), seq_len=64)
    again = config(trained[0], base.parent / "again", data=data, epochs=0)
    still = dataclasses.replace(again, optimizer=OptimizerConfig(peak_lr=1e-12, warmup_steps=0, weight_decay=0.0))
    reward_model(dataclasses.replace(still, loop=dataclasses.replace(still.loop, steps=1)))
    meta = json.loads((Path(again.run_dir) / "rows" / "meta.json").read_text())
    assert meta["items"] == 20 and {Path(name).name for name in meta["sources"]} == {"new.jsonl", "train.jsonl"}
    same = functools.partial(np.testing.assert_allclose, atol=1e-9)
    jax.tree.map(same, load(again.run_dir).params, load(trained[0]).params)
    with pytest.raises(ValueError, match="replay_share=1.0: must lie between 0 and 1"):
        PreferenceData(replay_share=1.0)


def test_a_stage_of_language_models_refuses_it(trained, base):
    start = SFTConfig(run_dir=str(base.parent / "sft"), init_from=str(trained[0]), data=SFTData(path=("x.jsonl",)))
    with pytest.raises(ValueError, match="num_labels=1: this is a model that scores text"):
        sft(start)


# As a reward


def expected(run: Path, question: str, answer: str) -> float:
    model = load(run)
    ids = encode_judged(model.text, [{"role": "user", "content": question}], answer)
    scores = model(jnp.asarray([ids])).scores
    assert scores is not None
    return float(scores[0, -1, 0])


def test_it_grades_summaries_in_batches_where_no_rule_does(trained, caplog):
    run, _ = trained
    task = make_task(TaskConfig(name="rows", prompt="q", answer="a"))
    asked = [*["n?"] * 36, "why?", "n?", "n?"]
    rows = [{"q": question, "a": "3" if index == 35 else None} for index, question in enumerate(asked)]
    said = [f"<think>x{END}{number}!" for number in range(35)] + ["4!", "5.", f"<think>{'y' * 9}", "9" * 80]
    with Grader((f"model:{run}=2", "accuracy=1"), task=task) as grader, caplog.at_level(logging.WARNING):
        grader.check(rows)
        grades = grader.grade(said, rows, whole=["no summary"] * 39)
        cut = grader.grade(said[:2], rows[:2], ended=[True, False]).rewards["model.helpful"]
    found = grades.rewards["model.helpful"]
    assert found[0] == pytest.approx(expected(run, "n?", "0!"), rel=1e-5)
    assert found[36] == pytest.approx(expected(run, "why?", "5."), rel=1e-5)
    assert np.isnan(found[35]) and grades.rewards["accuracy"][35] == 0  # a row with a right answer
    assert found[37] == np.nanmin(np.delete(found, 37))  # a thought without end
    # One of more tokens than it takes has no score, whatever it is graded with, and is told and counted.
    assert np.isnan(found[38]) and grades.failed_N.tolist() == [False] * 38 + [True]
    assert grades.metrics()["reward_unjudged"] == 1
    assert re.search(r"reward model\.helpful: unjudged for a row \(\d+ tokens, of which .* takes 64\)", caplog.text)
    assert cut[1] == cut[0] == pytest.approx(found[0], rel=1e-5)
    assert grades.total_N[0] == pytest.approx(2 * found[0])
    assert grades.metrics()["reward_model.helpful"] == pytest.approx(np.nanmean(found))
    with Grader((f"model:{run}:always",), task=task) as grader:
        assert np.isfinite(grader.grade(said[:38], rows[:38]).rewards["model.helpful"]).all()
        assert grader.grade(said[38:], rows[38:]).failed_N.all()


def test_rows_that_a_rule_grades_without_a_right_answer_are_not_judged(trained):
    """As instructions and code, in a run that mixes them with general questions."""
    run, _ = trained
    followed = {"task": "ifeval", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "prompt": "n?"}
    task, rows = make_task(TaskConfig(name="mixed")), [followed, {"task": "rows", "prompt": "n?", "answer": None}]
    assert [task.right(row) for row in rows] == [None, None]
    with Grader((f"model:{run}", "accuracy"), task=task) as grader:
        rewards = grader.grade(["4!", "4!"], rows).rewards
    assert np.isnan(rewards["model.helpful"]).tolist() == [True, False]
    assert np.isnan(rewards["accuracy"]).tolist() == [False, True]


def test_what_is_no_reward_model_is_named(trained, base, tmp_path):
    run, _ = trained
    for spec, message in (
        (f"model:{tmp_path}/none", "none does not exist"),
        (f"model:{base}", "is a released model's: a run of `deepseek-jax reward-model` is needed"),
        (f"model:{run}:often", "'often', where only 'always' may"),
        ("model", "model takes :PATH:ALWAYS, got none"),
    ):
        with pytest.raises(ValueError, match=f"reward '{spec}': ") as error:
            parse_reward(spec)
        assert message in str(error.value)
    with pytest.raises(ValueError, match="needs a task"):
        Grader((f"model:{run}",))
