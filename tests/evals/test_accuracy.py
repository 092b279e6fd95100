"""Accuracy: who is right, in batches that do not come out even."""

import jax
import numpy as np
import pytest
from model.tiny import weights
from small import SPEAKER, tokenizer

from deepseek_jax.data.chat import encode_prompt
from deepseek_jax.evals.accuracy import Answered, accuracy, accuracy_by_kind, answer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import Generated
from deepseek_jax.rl import problems as rl

PROBLEMS = rl.sample_problems(np.random.default_rng(0), 7, rl.KINDS, held_out=True)


def ask(problems=PROBLEMS, *, batch_size=3, temperature=0.0, seed=0):
    return answer(
        SPEAKER,
        *weights(SPEAKER),
        tokenizer(),
        problems,
        max_tokens=12,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
    )


def test_right_answers_are_counted_problem_by_problem(monkeypatch):
    """The engine answers problem i: right, with a wrong number, or right but without an end, in turns."""
    prompts = [encode_prompt(tokenizer(), rl.to_prompt(problem)) for problem in PROBLEMS]
    widths = set()

    def generate_ids(self, rows, sampling, key, *, width):
        widths.add((len(rows), width))
        tokens = np.zeros((len(rows), sampling.max_tokens), np.int32)
        lengths, stopped = [], []
        for row, prompt in enumerate(rows):
            index = prompts.index(prompt)
            text = PROBLEMS[index].answer if index % 3 != 1 else "0"
            ids = [tokenizer().end_think_id, *tokenizer().encode(text)]
            ids += [tokenizer().eos_id] * (index % 3 != 2)
            tokens[row, : len(ids)] = ids
            lengths.append(len(ids))
            stopped.append(index % 3 != 2)
        return Generated(tokens, tokens * 0.0, np.array(lengths), np.array(stopped))  # pyright: ignore

    monkeypatch.setattr(Engine, "generate_ids", generate_ids)
    answered = ask()
    assert [item.problem for item in answered] == PROBLEMS
    assert [item.correct for item in answered] == [True, False, False, True, False, False, True]
    assert answered[0].completion == "</think>" + PROBLEMS[0].answer
    assert widths == {(3, max(map(len, prompts)))}  # one shape: one program


def test_greedy_answers_do_not_depend_on_the_batch():
    completions = [[item.completion for item in ask(batch_size=size)] for size in (2, 4)]
    assert completions[0] == completions[1]


def test_sampled_answers_follow_the_seed():
    found = [[item.completion for item in ask(temperature=1.0, batch_size=4, seed=seed)] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) > 4


def test_accuracy_has_the_error_of_a_proportion():
    answered = [Answered(PROBLEMS[i], "", i < 2) for i in range(7)]
    share, error = accuracy(answered)
    assert share == pytest.approx(2 / 7)
    assert error == pytest.approx(np.std([1, 1, 0, 0, 0, 0, 0]) / np.sqrt(7))
    kinds = {kind: [p.kind for p in PROBLEMS[:2]].count(kind) for kind in rl.KINDS}
    total = {kind: [p.kind for p in PROBLEMS].count(kind) for kind in rl.KINDS}
    assert accuracy_by_kind(answered) == pytest.approx({kind: kinds[kind] / total[kind] for kind in rl.KINDS})


def test_parameters_stay_usable():
    ask()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(weights(SPEAKER)))
