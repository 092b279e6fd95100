"""Planted facts: where they stand, and that what is counted is what a model says."""

import json
import re
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.cli.main import main
from deepseek_jax.evals import needle
from deepseek_jax.evals.haystack import FACT, KEYS, documents
from deepseek_jax.evals.needle import Needle, find_needles, plant, rows_of
from deepseek_jax.inference.engine import Engine

BEFORE, _, BEHIND = FACT.partition("{value}")
ASKED = re.compile(BEFORE.rstrip().format(key=r"(\w+)") + "$")
STATED = re.compile(BEFORE.format(key=r"(\w+)") + r"(\w+)" + BEHIND.format(key=r"\1"))


def reader(tokens: int, monkeypatch) -> None:
    """In the engine's place one that looks a fact up in the last so many tokens of a prompt."""

    def generate(self, prompts, sampling):
        del sampling
        texts = [(tokenizer().decode(ids), tokenizer().decode(ids[-tokens:])) for ids in prompts]
        said = [dict(STATED.findall(seen)).get(ASKED.findall(text)[0], "") for text, seen in texts]
        return [SimpleNamespace(text=f" {value}") for value in said]

    monkeypatch.setattr(needle, "Engine", lambda model: SimpleNamespace(generate=generate.__get__(model)))


@pytest.fixture
def model():
    return whole(SPEAKER, *weights(SPEAKER), tokenizer())


@pytest.mark.parametrize("depth", [0, 50, 100])
def test_a_fact_is_planted_at_its_depth(depth):
    options, length = Needle(lengths=(600,), others=2), 600
    asked = plant(tokenizer(), options, length, depth, np.random.default_rng(0))
    text = tokenizer().decode(asked.prompt)
    (key,) = ASKED.findall(text)
    facts = {match[1]: match for match in STATED.finditer(text)}
    assert len(facts) == 3 and facts[key][2] == asked.value
    assert len({match[2] for match in facts.values()}) == 3  # no other's value is right
    used = len(asked.prompt) + len(asked.value_ids)
    assert length - 60 < used <= length
    before, behind = facts[key].start(), text.rindex(BEFORE.format(key=key).rstrip()) - facts[key].end()
    assert abs(before / (before + behind) - depth / 100) < 0.06


def test_what_is_read_is_found_and_what_is_not_is_not(model, monkeypatch):
    options = Needle(lengths=(400, 800), depths=(0, 25, 75, 100), samples=3)
    reader(800, monkeypatch)
    assert find_needles(model, options, batch_size=5)["found"] == [[1.0] * 4] * 2
    reader(400, monkeypatch)  # a window
    found = find_needles(model, options, batch_size=5)
    assert found["found"] == [[1.0] * 4, [0.0, 0.0, 1.0, 1.0]]
    assert rows_of(found)[0].split() == ["tokens", "0", "%", "25", "%", "75", "%", "100", "%", "all"]
    assert rows_of(found)[2].split() == ["800", "0", "0", "100", "100", "50.0"]


def test_sentences_of_ones_own_and_another_fact(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("First of all. Was there a second?\nThird!")
    options = Needle(lengths=(300,), path=(str(file),), fact="{key} keeps {value} here.", others=0)
    text = tokenizer().decode(plant(tokenizer(), options, 300, 40, np.random.default_rng(0)).prompt)
    words = re.sub(r" (\w+) keeps \w+ here\.", "", text)
    assert set(re.findall(r"[^.?!]+[.?!]", words)) == {" First of all.", " Was there a second?", " Third!"}
    assert re.search(r" \w+ keeps$", text)


def test_beyond_what_the_model_is_made_for(model, tmp_path, monkeypatch, capsys):
    """The command measures a model's own engine, past its max_position_embeddings too."""
    from deepseek_jax.cli import evaluate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "find_model", lambda path: path)
    monkeypatch.setattr(evaluate, "described", lambda path, step: path)
    monkeypatch.setattr(evaluate, "load", lambda path, **options: model)
    asked = ["--needle.lengths", "256", "--needle.depths", "0", "100", "--needle.samples", "1", "--needle.others", "0"]
    assert main(["eval", "run", *asked, "--out", "out"]) == 0
    written = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert written == {"lengths": [256], "depths": [0, 100], "samples": 1, "found": [[0.0, 0.0]]}
    assert (tmp_path / "out" / "needle.png").stat().st_size > 1000
    assert "max_position_embeddings is 64" in capsys.readouterr().err
    assert Engine(model).config.max_position_embeddings == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (101,)}, r"depths=\(101,\)"),
        ({"others": len(KEYS)}, "others="),
        ({"fact": "{value} is {key}'s"}, "must have {key}, and {value} behind it"),
        ({"fact": "{key}"}, "must have {key}, and {value} behind it"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_what_is_no_needle(options, message):
    with pytest.raises(ValueError, match=message):
        Needle(**options)
    with pytest.raises(ValueError, match="64 tokens do not hold 4 facts"):
        plant(tokenizer(), Needle(), 64, 0, np.random.default_rng(0))


def test_texts_to_train_on_state_facts_again():
    rows = [row["text"] for row in islice(documents(40, seed=1), 50)]
    assert rows == [row["text"] for row in islice(documents(40, seed=1), 50)]
    stated = [STATED.findall(text) for text in rows]
    assert all(len(dict(facts)) == len(set(facts)) <= 5 for facts in stated)  # a key has one value in a text
    assert sum(map(len, stated)) > 2 * sum(len(set(facts)) for facts in stated)
    with pytest.raises(ValueError, match="size=7"):
        next(documents(7, seed=0))
