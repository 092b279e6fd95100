"""Pretraining that goes on from a model, its context extended from the first step on: YaRN as transformers has it."""

import dataclasses
import json
from itertools import islice
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small import tokenizer

from deepseek_jax import load
from deepseek_jax.cli.main import main
from deepseek_jax.config import ModelConfig, RopeScaling
from deepseek_jax.evals.haystack import documents
from deepseek_jax.workflows.pretrain import PretrainConfig, with_context
from deepseek_jax.workflows.recipe import load_recipe

YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=16)
MODEL = {
    "vocab-size": 300,
    "hidden-size": 16,
    "num-hidden-layers": 1,
    "first-k-dense-replace": 1,
    "intermediate-size": 24,
    "num-attention-heads": 2,
    "q-lora-rank": 8,
    "kv-lora-rank": 8,
    "qk-nope-head-dim": 8,
    "qk-rope-head-dim": 8,
    "v-head-dim": 8,
    "initializer-range": 0.3,
    "num-nextn-predict-layers": 0,
    "max-position-embeddings": 16,
}
DATA = ["--data.path", "texts.jsonl", "--data.fim-rate", "0"]
LOOP = ["--batch-size", "8", "--loop.log-every", "1", "--loop.steps"]
SHORT = [part for name, value in MODEL.items() for part in (f"--model.{name}", str(value))]
SHORT += ["--data.tokenizer", "tokenizer", "--data.seq-len", "16", "--run-dir", "short"]
LONG = ["--init-from", "short", "--data.seq-len", "64", "--run-dir", "long", "--optimizer.peak-lr", "1e-12"]
LONG += ["--model.rope-scaling.type", "yarn", "--model.rope-scaling.factor", "4"]
LONG += ["--model.rope-scaling.original-max-position-embeddings", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """short, a run, and long, which extends it, trained next to nothing."""
    folder = tmp_path_factory.mktemp("extension")
    tokenizer().save(folder / "tokenizer")
    with open(folder / "texts.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in islice(documents(20, seed=0), 20))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert main(["pretrain", *SHORT, *DATA, *LOOP, "2"]) == 0
        assert main(["pretrain", *LONG, *DATA, *LOOP, "1"]) == 0
    return folder


def test_the_context_is_extended_at_the_start(folder: Path) -> None:
    short, long = (load(folder / name) for name in ("short", "long"))
    assert long.config == dataclasses.replace(short.config, rope_scaling=YARN, max_position_embeddings=64)
    written = json.loads((folder / "long" / "config.json").read_text())
    assert written["model"] == long.config.to_dict() and written["recipe"]["init_from"] == "short"
    assert long.text.fingerprint == short.text.fingerprint


def test_at_its_start_it_is_what_transformers_makes_of_the_model_with_yarn(folder: Path, monkeypatch) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(folder)
    for name in ("short", "long"):
        assert main(["convert", name, f"{name}-hf", "--dtype", "float32"]) == 0
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0}
    scaling |= {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert json.loads(Path("long-hf/config.json").read_text())["rope_scaling"] == scaling
    # Transformers reads the short model, and is told of YaRN itself.
    content = json.loads(Path("short-hf/config.json").read_text())
    Path("short-hf/config.json").write_text(json.dumps(content | {"rope_scaling": scaling}))
    tokens = np.random.default_rng(0).integers(3, 280, (2, 64), np.int32)
    ours = np.asarray(load("long")(jnp.asarray(tokens)).logits)
    for name in ("short-hf", "long-hf"):
        peer = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        with torch.no_grad():
            theirs = peer(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * abs(theirs).max())
    plain = np.asarray(load("short")(jnp.asarray(tokens)).logits)
    assert abs(plain - ours).max() > 1e-2 * abs(ours).max()


def test_it_goes_on_and_a_next_phase_keeps_it(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    assert main(["pretrain", *LONG, *DATA, *LOOP, "2"]) == 0
    assert "long: goes on from step 1" in capsys.readouterr().err
    assert main(["pretrain", *LONG[:-4], *DATA, *LOOP, "2"]) == 1
    assert "model.rope_scaling.factor is 4.0 there and 1.0 here" in capsys.readouterr().err
    more = ["--init-from", "long", "--data.seq-len", "32", "--run-dir", "next"]
    assert main(["pretrain", *more, *DATA, *LOOP, "1"]) == 0
    assert load("next").config == load("long").config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.hidden-size", "32"], "model.hidden_size=32 (it has 16): the model in init_from is another"),
        (["--data.tokenizer", "tokenizer"], "data.tokenizer='tokenizer': the model in init_from='short' has its own"),
        (["--data.seq-len", "65"], "data.seq_len=65 is more than model.max_position_embeddings=64"),
        (["--init-from", ""], "data.tokenizer is empty"),
    ],
)
def test_what_cannot_be_extended(folder: Path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(folder)
    assert main(["pretrain", *LONG, *DATA, *LOOP, "1", "--run-dir", "never", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not Path("never/checkpoints").exists()


def test_the_length_that_a_scaling_is_made_for() -> None:
    own = ModelConfig(max_position_embeddings=128, rope_theta=5e5)
    extended = with_context(own, ModelConfig(rope_scaling=dataclasses.replace(YARN, factor=8.0)))
    assert (extended.max_position_embeddings, extended.rope_theta) == (128, 5e5)
    given = ModelConfig(rope_scaling=YARN, max_position_embeddings=60, rope_theta=1e6)
    assert with_context(own, given) == given
    assert with_context(given, ModelConfig()) == given


def test_v3_is_extended_as_in_its_paper() -> None:
    """Section 4.3: 1,000 steps of 1,920 sequences of 32K, then of 480 of 128K, at 7.3e-6."""
    first, second = (load_recipe(f"extension/v3:{name}", PretrainConfig) for name in ("to_32k", "to_128k"))
    released = load_recipe("models/deepseek_v3", ModelConfig)
    before = dataclasses.replace(released, rope_scaling=RopeScaling(), max_position_embeddings=4096)
    assert with_context(before, first.model) == released == with_context(released, second.model)
    assert first.batch_size * first.data.seq_len == second.batch_size * second.data.seq_len == 1920 * 32 * 1024
    assert second.init_from == first.run_dir and second.data.seq_len == 128 * 1024 < released.max_position_embeddings
    assert {phase.optimizer.peak_lr for phase in (first, second)} == {7.3e-6}
    assert {phase.loop.steps for phase in (first, second)} == {1000}


def test_the_miniature_is_extended_as_v3_is_in_its_first_phase() -> None:
    short, long = (load_recipe(f"extension/miniature:{name}", PretrainConfig) for name in ("short", "long"))
    v3, after = load_recipe("extension/v3:to_32k", PretrainConfig), with_context(short.model, long.model)
    own = dataclasses.replace(v3.model.rope_scaling, original_max_position_embeddings=short.data.seq_len)
    assert after.rope_scaling == own and long.init_from == short.run_dir
    assert long.data.seq_len / short.data.seq_len == v3.data.seq_len / 4096
    assert after.max_position_embeddings == long.data.seq_len
