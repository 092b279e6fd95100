"""Answers in several turns: what is the model's and what it was told, to the learner, the grader and the reader."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, state, tokenizer

from deepseek_jax.data.loader import LoaderOptions
from deepseek_jax.data.rows import PromptLoader
from deepseek_jax.data.template import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evals.accuracy import answer
from deepseek_jax.files import read_json_lines
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import Generated
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.rl import conversing
from deepseek_jax.rl.asking import Question, ask
from deepseek_jax.rl.conversing import converse
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.rollout import Rollouts
from deepseek_jax.rl.rollout_config import RolloutConfig
from deepseek_jax.rl.sample_log import SampleLog
from deepseek_jax.rl.samples import rollout_batch
from deepseek_jax.rl.tasks import TaskConfig, make_task
from deepseek_jax.rl.tools import Call, Tools, ToolsConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop_config import LoopConfig
from deepseek_jax.workflows.questions import Answers, Asking

LONG = dataclasses.replace(SPEAKER, max_position_embeddings=512)
MODEL = whole(LONG, *weights(LONG), tokenizer())
TEXT = tokenizer()


@functools.cache
def tools() -> Tools:
    return Tools(ToolsConfig(use=("calculator",), calls=2, told=False))


@pytest.mark.parametrize("pack", [0, 500])
def test_the_learner_scores_each_of_the_models_own_tokens_as_the_sampler_drew_it(monkeypatch, pack):
    """A network of experts whose turns end early, each with a call. What it was told is in the context alone, and the
    mask is on what the engine returned, turn by turn."""
    monkeypatch.setattr(conversing, "read_call", lambda text: Call("calculator", "6*7") if len(text) % 3 else None)
    engine, turns = Engine(MODEL), []
    generate_ids = engine.generate_ids

    def recorded(prompts, *arguments, **options):
        out = jax.device_get(generate_ids(prompts, *arguments, **options))
        turns.append([(prompt, out.tokens_BN[row, : out.lengths_B[row]]) for row, prompt in enumerate(prompts)])
        return out

    monkeypatch.setattr(engine, "generate_ids", recorded)
    questions = [Question({}, "", TEXT.encode(text), "") for text in ("12+34=", "7*8=5", "1", "2+2=")]
    ends = tuple(range(20, 300, 6))
    sampling = SamplingParams(temperature=1.3, max_tokens=110, stop_token_ids=ends)
    samples = converse(engine, tools(), questions, sampling, jax.random.key(3), experts=True)
    told = [TEXT.user_id, *TEXT.encode("<result>42</result>"), TEXT.assistant_id]
    assert len(turns) == 3 and {sample.calls["calls"] for sample in samples} >= {2}
    for question, sample in zip(questions, samples, strict=True):
        rebuilt, own = list[int](), list[bool]()
        for turn in turns:
            for prompt, ids in turn:
                if prompt == question.prompt + rebuilt + told * bool(rebuilt):
                    own += [False] * len(told) * bool(rebuilt) + [True] * len(ids)
                    rebuilt += told * bool(rebuilt) + ids.tolist()
                    break
        assert sample.ids.tolist() == rebuilt
        assert all(own) if sample.own is None else sample.own.tolist() == own
        assert not np.any(sample.logprobs[~np.array(own)]) and np.all(sample.logprobs[own] < 0)
        assert sample.answer.text == TEXT.decode(rebuilt[sample.last_turn : -1], skip_special_tokens=False)
        assert len(sample.answer.turns) == 2 * own.count(False) // len(told)
    batch = rollout_batch(samples, [1.0, -1.0, 0.5, 0.2], pad_id=TEXT.pad_id, most=400, pack=pack)
    batch |= {"temperature": np.full((len(batch["tokens"]), 1), 1.3, np.float32)}
    assert batch["loss_mask"].sum() == sum(sample.length for sample in samples)
    assert not np.any(batch["sampler_logprobs"] * (1 - batch["loss_mask"]))
    ran = batch["experts"][:, :, 0, 0] >= 0  # of every token that another follows
    assert np.array_equal(
        ran, (np.roll(batch["segment_ids"], -1, 1) == batch["segment_ids"]) & (batch["segment_ids"] > 0)
    )
    loss = GRPOLoss(chunk=16)
    run = jax.jit(lambda batch: loss(MODEL.network(), batch, loss.normalisers(batch), jnp.int32(0))[1]["kl_sampler"])
    assert 0 <= run({name: jnp.asarray(value) for name, value in batch.items()}) < 1e-6
    alone = {name: value for name, value in batch.items() if name != "experts"}
    assert 0 <= run({name: jnp.asarray(value) for name, value in alone.items()}) < 1e-6
    assert run(alone | {"loss_mask": (batch["segment_ids"] > 0) * 1.0}) > 1e-3  # it would see tokens of others


# Scripted


def scripted(monkeypatch, script):
    """Each turn says the next text of its question; `…` is cut off by the limit."""
    asked = []

    def generate_ids(self, prompts, sampling, key=None, *, experts=False, filled=0):
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        tokens = np.full((len(prompts), max(params.max_tokens for params in each)), TEXT.pad_id, np.int32)
        lengths, stopped = [], []
        for row, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
            text = self.tokenizer.decode(prompt, skip_special_tokens=False)
            asked.append((text, params.max_tokens))
            which = next(name for name in script if name in text)
            said = script[which][text.count("<result>")]
            ids = self.tokenizer.encode(said, allow_special=True)
            ids = ids[: params.max_tokens] if said.endswith("…") else [*ids, self.tokenizer.eos_id]
            tokens[row, : len(ids)] = ids
            lengths.append(len(ids))
            stopped.append(not said.endswith("…"))
        return Generated(tokens, -0.1 - 0.0 * tokens, np.array(lengths), np.array(stopped))  # pyright: ignore

    monkeypatch.setattr(Engine, "generate_ids", generate_ids)
    monkeypatch.setattr(Engine, "update", lambda *arrays: None)
    return asked


CALL = "<tool>calculator: {}</tool>"
SCRIPT = {
    "6*7": ["Wait, I ask. " + CALL.format("6*7"), "But yes. #### 42"],
    "5*5": [CALL.format("5*"), CALL.format("5*5"), "#### 25"],
    "8*8": [CALL.format("8*8"), CALL.format("8"), CALL.format("64")],
    "1+1": ["#### 3"],
}


@pytest.fixture
def path(tmp_path):
    rows = [f'{{"question": "{text}?", "answer": "{eval(text)}"}}\n' for text in SCRIPT]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    return str(tmp_path / "rows.jsonl")


def config(path, **fields) -> TaskConfig:
    return TaskConfig(prompt="question", path=(path,), tools=ToolsConfig(use=("calculator",), told=False, **fields))


def test_a_step_of_grpo_with_tools(path, tmp_path, monkeypatch):
    scripted(monkeypatch, SCRIPT)
    task, options = make_task(config(path, calls=2)), LoaderOptions(batch_size=4, seed=0)
    grader, rollout = Grader(["accuracy"], task=task), RolloutConfig(prompts=4, group=2, max_tokens=200, patience=0)
    grade, judged = grader.grade, []
    monkeypatch.setattr(grader, "grade", lambda *given, whole, **more: judged.extend(whole) or grade(*given, **more))
    log = SampleLog(tmp_path, LoopConfig(steps=9, log_every=1))
    run = Rollouts(MODEL, task, grader, PromptLoader(path, **options), rollout, seed=0, log=log)
    batch, metrics = run.next(state())
    assert metrics["tool_calls"] == (1 + 2 + 2 + 0) / 4 and metrics["tool_errors"] == 2  # both of the group of 5*5
    assert metrics["tool_unknown"] == metrics["tool_timeouts"] == metrics["tool_cut"] == 0
    assert metrics["reward_accuracy"] == 1 / 2  # of the last turn: 8*8's is a call too many
    assert metrics["response_length"] == batch["loss_mask"].sum() / 8 and metrics["truncated"] == 1 / 4
    assert metrics["response_waits"] == 2 / 4  # 6*7's of both turns; a result's "error" is not the model's
    lines = read_json_lines(tmp_path / "rollouts.jsonl")
    assert sorted(judged) == sorted(line["completion"] for line in lines)  # all turns are there for a judge of all
    for line in lines:
        row = next(row for row in range(8) if line["prompt"] in TEXT.decode(batch["tokens"][row].tolist()))
        own, said = batch["loss_mask"][row] > 0, SCRIPT[line["prompt"][:-1]]
        assert TEXT.decode(batch["tokens"][row][own].tolist()) == "".join(said)
        assert line["tokens"] == own.sum() and all(text in line["completion"] for text in said)
        if line["prompt"] == "5*5?":
            turns = line["completion"].split("\n")
            assert turns[1] == "<result>error: ValueError: not an arithmetic expression: 5*</result>"
            assert turns[3] == "<result>25</result>" and len(turns) == 5


def test_eval_and_the_answers_that_are_kept_have_all_turns(path, tmp_path, monkeypatch):
    asked = scripted(monkeypatch, SCRIPT)
    task, engine = make_task(config(path, calls=2)), Engine(MODEL)
    rows = [{"question": f"{text}?", "answer": str(eval(text))} for text in SCRIPT]
    found = answer(engine, task, rows, max_tokens=200, temperature=0.0, batch_size=3)
    assert [item.correct for item in found] == [True, True, False, False]
    assert found[1].completion == "#### 25"
    assert {limit for _, limit in asked[:3]} == {200} and all(
        limit < 200 for text, limit in asked if "<result>" in text
    )
    lines = Answers(config(path, calls=2), Asking(samples=1, temperature=0.0)).complete(engine, tmp_path, 3)
    assert [line["correct"] for line in lines] == [True, True, False, False]
    roles = [[turn["role"] for turn in line.get("turns", [])] for line in lines]
    assert roles == [["assistant", "user"] * calls for calls in (1, 2, 2, 0)]
    assert lines[0]["turns"] == [
        {"role": "assistant", "content": SCRIPT["6*7"][0]},
        {"role": "user", "content": "<result>42</result>"},
    ]


def test_results_and_answers_are_bounded(path, monkeypatch, tmp_path):
    """A result that is too long is cut, which the model is told; an answer without room for a turn has not ended."""
    (tmp_path / "mine.py").write_text("def long(text): return 'ab ' * 5000\n")
    scripted(monkeypatch, {"6*7": ["<tool>long: x</tool>", "#### 42"], "5*5": ["<tool>long: x</tool>…"]})
    many = Tools(ToolsConfig(use=(f"{tmp_path}/mine.py:long",), result_tokens=20))
    task = make_task(config(path))
    questions = [ask(task, TEXT, {"question": text, "answer": "#### 1"}) for text in ("6*7", "5*5")]
    for room, ended in ((120, True), (40, False)):
        first, second = converse(Engine(MODEL), many, questions, SamplingParams(max_tokens=room), jax.random.key(0))
        assert first.answer.ended == ended and not second.answer.ended and len(first.ids) <= room
        assert first.calls["cut"] == first.calls["calls"] == 1 and not second.calls
        if ended:
            assert first.own is not None and "(cut off)</result>" in TEXT.decode(first.ids[~first.own].tolist())
            assert (~first.own).sum() < 20 + 40 and first.answer.text == "#### 42"
        else:
            assert first.own is None and first.answer.turns == ()


CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_results_are_told_by_the_models_own_template(path, monkeypatch, opened):
    """What the model reads in its second turn is what the template writes of the conversation; a `<think>` that the
    template opens belongs to the turn that it opens."""
    source = CHATML.replace("<|im_start|>assistant\n{% endif", f"<|im_start|>assistant\n{opened}{{% endif")
    text = Tokenizer(tokenizer()._special, template=ChatTemplate(source, {}))
    asked = scripted(monkeypatch, SCRIPT)
    engine = Engine(whole(LONG, *weights(LONG), text))
    task = make_task(config(path))
    question = ask(task, text, {"question": "6*7", "answer": "#### 42"})
    (sample,) = converse(engine, task.tools, [question], SamplingParams(max_tokens=300), jax.random.key(0))
    messages = [{"role": "user", "content": "6*7"}, {"role": "assistant", "content": SCRIPT["6*7"][0]}]
    messages.append({"role": "user", "content": "<result>42</result>"})
    expected = ChatTemplate(source, {}).render(messages)
    eos = text.decode([text.eos_id], skip_special_tokens=False)
    head, _, tail = expected.partition(SCRIPT["6*7"][0])
    assert asked[-1][0] == f"{head}{opened}{SCRIPT['6*7'][0]}{eos}{tail}"  # the template's end is no stop id here
    assert sample.answer.text == f"{opened.strip()}{SCRIPT['6*7'][1]}" and sample.start == opened.strip()


def test_a_template_of_one_question_cannot_be_told_results(path):
    text = Tokenizer(tokenizer()._special, template=ChatTemplate("{{ messages[0]['content'] }}=", {}))
    engine, task = Engine(whole(LONG, *weights(LONG), text)), make_task(config(path))
    question = ask(task, text, {"question": "6*7", "answer": "#### 42"})
    with pytest.raises(ValueError, match="the chat template writes no question behind an answer"):
        converse(engine, task.tools, [question], SamplingParams(max_tokens=30), jax.random.key(0))
