"""All stages in miniature: what they leave behind, killed and resumed to the bit, and a second call."""

import dataclasses
import io
import json
import random
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from rich.console import Console
from workflows.miniature import TESTS, run_demo

from deepseek_jax.checkpoint.model import load
from deepseek_jax.data.rows import open_rows
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.rl import arithmetic as rl
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows import demo as demo_module
from deepseek_jax.workflows.corpus import CorpusConfig
from deepseek_jax.workflows.demo import RECIPE_DIR, CorpusStage, DemoConfig, demo, make_corpus
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData, pretrain
from deepseek_jax.workflows.recipe import load_recipe, moved
from deepseek_jax.workflows.sft import SFTData
from deepseek_jax.workflows.stage_config import StageConfig

STEPS = {"pretrain": 24, "sft": 40, "grpo": 12}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("stage", STEPS)
def test_a_stage_leaves_its_record(miniature, stage):
    folder = miniature / "run" / stage
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS[stage] + 1))
    names = {"loss", "grad_norm", "lr", "tokens", "finite", "max_vio", "load", "bias_range"}
    if stage == "grpo":
        names |= {"reward", "reward_accuracy", "reward_format", "response_length", "truncated", "signal_groups"}
        names |= {"kl_sampler", "kl_reference", "clip_fraction", "entropy"}
    else:
        names |= {"ce", "mtp", "balance"}
    for line in lines:
        assert line.keys() >= names and line["finite"] == 1
        np.testing.assert_allclose(np.sum(line["load"], axis=1), 1, rtol=1e-5)
    assert all(line["tokens_per_second"] > 0 for line in lines[1:])
    assert (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    assert any((folder / "tensorboard").iterdir()) and any((folder / "checkpoints").iterdir())
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == result["steps_here"] == STEPS[stage]
    assert 0 < result["parameters_active"] < result["parameters_total"]


def test_training_learns(miniature):
    pretrain, sft = (read_metrics(miniature / "run" / stage) for stage in ("pretrain", "sft"))
    assert pretrain[-1]["ce"] < pretrain[0]["ce"] - 0.5
    assert sft[-1]["ce"] < sft[0]["ce"] - 1
    bits = [line["eval/bits_per_byte"] for line in pretrain if "eval/bits_per_byte" in line]
    assert len(bits) == 2 and bits[1] < bits[0]
    result = json.loads((miniature / "run" / "pretrain" / "result.json").read_text())
    assert result["bits_per_byte"] == bits[1]
    assert [line["step"] for line in sft if "eval/accuracy_held_in" in line] == [20, 40]
    losses = [line["eval/loss"] for line in sft if "eval/loss" in line]
    result = json.loads((miniature / "run" / "sft" / "result.json").read_text())
    assert losses[1] < losses[0] and losses[1] == result["heldout_loss"]
    grpo = [line for line in read_metrics(miniature / "run" / "grpo") if "eval/accuracy_greedy" in line]
    assert [line["step"] for line in grpo] == [6, 12] and "eval/accuracy_sampled_stderr" in grpo[0]


def test_the_sampler_stays_with_the_learner(miniature):
    lines = read_metrics(miniature / "run" / "grpo")
    assert all(0 <= line["kl_sampler"] < 1e-6 for line in lines)
    # The second update of a batch has moved away from the reference.
    assert max(line["kl_reference"] for line in lines) > 1e-3


def test_evaluation_asks_the_held_out_problems(miniature):
    run = miniature / "run"
    held_out = {problem.prompt for problem in rl.read_jsonl(run / "corpus" / "problems_heldout.jsonl")}
    for stage in ("sft", "grpo"):
        samples = lines_of(run / stage / "samples.jsonl")
        assert {(sample["when"], sample["mode"]) for sample in samples} >= {("after", "greedy"), ("after", "sampled")}
        for mode in ("greedy", "sampled"):
            asked = [s["prompt"] for s in samples if (s["when"], s["mode"]) == ("after", mode)]
            assert set(asked) == held_out and len(asked) == 8
        result = json.loads((run / stage / "result.json").read_text())
        assert result["problems"] == 8 and 0 <= result["accuracy_greedy"] <= 1


def test_the_report_and_the_experts_are_written(miniature):
    run = miniature / "run"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<img" in page or "<svg" in page
    experts = json.loads((run / "grpo" / "experts.json").read_text())
    assert experts["kinds"] == ["code", "prose", "digits", "thinking"]
    share = np.array(experts["share"])
    assert share.shape == (4, 1, 8)
    np.testing.assert_allclose(share.sum(axis=-1), 1, rtol=1e-6)
    assert "bits per byte" in (miniature / "done").read_text(encoding="utf-8")


CLOCKS = (
    "time",
    "seconds",
    "tokens_per_second",
    "peak_bytes_process",
    "rollout_seconds",
    "reward_seconds",
)  # all that may differ between two runs
CLOCKS += ("train_seconds", "samples_per_second", "rollout_tokens_per_second")


def same_lines(found: Path, expected: Path) -> None:
    """Every metric of every step, to the bit; only the clock may differ."""
    lines = [
        [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(folder)]
        for folder in (found, expected)
    ]
    for line, wanted in zip(*lines, strict=True):
        assert line == wanted, f"{found.name}, step {wanted['step']}"


def test_kill_9_and_again_goes_on_to_the_bit(miniature, tmp_path):
    """Killed at a random step of pretraining, of SFT (past its first epoch) and within a rollout; then finished."""
    draw = random.Random(2)
    rows = len(open_rows(miniature / "run" / "sft" / "rows"))
    epoch = -(-rows // 4)
    assert 3 * epoch < STEPS["sft"]
    # After a checkpoint, so that there is something to go on from.
    kills = [
        ("pretrain", draw.randint(7, STEPS["pretrain"] - 1)),
        ("sft", draw.randint(2 * epoch + 6, STEPS["sft"] - 1)),
        ("grpo", draw.randint(5, STEPS["grpo"] - 1)),
    ]
    for stage, call in kills:
        killed = run_demo(tmp_path, "run", str(TESTS / "workflows" / "killed.py"), stage, str(call))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "run" / stage / "result.json").exists()
        assert read_metrics(tmp_path / "run" / stage)[-1]["step"] < call
    finished = run_demo(tmp_path, "run")
    assert finished.returncode == 0, finished.stderr
    for stage in STEPS:
        same_lines(tmp_path / "run" / stage, miniature / "run" / stage)
    results = [json.loads((f / "run" / "grpo" / "result.json").read_text()) for f in (tmp_path, miniature)]
    for name in ("accuracy_greedy", "accuracy_sampled", "by_kind", "steps"):
        assert results[0][name] == results[1][name]
    samples = [lines_of(f / "run" / "grpo" / "samples.jsonl") for f in (tmp_path, miniature)]
    assert samples[0] == samples[1]


def test_a_stage_runs_on_a_mesh_and_goes_on_with_another(miniature, tmp_path, monkeypatch):
    """Eight devices; then one reads the parameters, whole."""
    monkeypatch.chdir(miniature)
    base = moved(load_recipe(str(miniature / "recipes" / "pretrain.py"), PretrainConfig), RECIPE_DIR, "run")
    data = dataclasses.replace(base.data, heldout=())
    options = StepConfig(ema_decay=0.5)
    base = dataclasses.replace(base, run_dir=str(tmp_path / "mesh"), batch_size=8, step=options, data=data)
    loop = dataclasses.replace(base.loop, eval_every=0, checkpoint_every=2, keep=2)
    for steps, mesh in ((2, MeshConfig(fsdp=4, data=2)), (4, MeshConfig(expert=2, tensor=2, data=2))):
        result = pretrain(dataclasses.replace(base, mesh=mesh, loop=dataclasses.replace(loop, steps=steps)))
        assert result["steps"] == steps
    lines = read_metrics(tmp_path / "mesh")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["finite"] == 1 for line in lines) and lines[-1]["ce"] < lines[0]["ce"]
    trained = load(tmp_path / "mesh")
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(trained.params))
    older, mean = load(tmp_path / "mesh", step=2), load(tmp_path / "mesh", ema=True)
    newest, older, mean = (ravel_pytree(model.params)[0] for model in (trained, older, mean))
    assert np.linalg.norm(newest - mean) > 0 and np.linalg.norm(newest - older) > 0
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 .*\[2, 4\]"):
        load(tmp_path / "mesh", step=3)
    with pytest.raises(ValueError, match="run/sft keeps no running mean of its parameters: step.ema_decay was 0"):
        load("run/sft", ema=True)


def test_a_second_call_does_nothing(miniature, tmp_path, monkeypatch):
    shutil.copytree(miniature, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    for stage in STEPS:
        monkeypatch.setattr(demo_module, stage, None)  # would be called, and cannot
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    out = io.StringIO()
    recipes = str(tmp_path / "copy" / "recipes")
    demo(DemoConfig(run_dir="run", recipes=recipes), Console(file=out, width=200))
    for stage in STEPS:
        assert f"{stage} is done already" in out.getvalue()
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    assert {path for path in after if after[path] != before[path]} <= {Path("run/report.html")}
    Path("run/grpo/experts.json").unlink()  # as a kill right after the stage would
    demo(DemoConfig(run_dir="run", recipes=recipes), Console(file=out, width=200))
    assert Path("run/grpo/experts.json").read_bytes() == after[Path("run/grpo/experts.json")]


def test_a_corpus_of_another_configuration_is_refused(miniature, monkeypatch):
    monkeypatch.chdir(miniature)
    config = load_recipe("recipes/corpus.py", CorpusStage)
    corpus = dataclasses.replace(config.corpus, vocab_size=301, seed=1)
    message = "run/corpus holds a corpus of other settings: seed is 0 there and 1 here; vocab_size is 300 there and 301"
    with pytest.raises(ValueError, match=message):
        make_corpus(dataclasses.replace(config, folder="run/corpus", corpus=corpus))
    with pytest.raises(ValueError, match="run/corpus holds a corpus of other settings: seed is 0 there and 4 here"):
        demo(DemoConfig(run_dir="run", recipes="recipes", seed=4))


def test_a_stage_that_is_done_with_other_settings_is_not_taken_for_this_one(miniature, monkeypatch, tmp_path):
    monkeypatch.chdir(miniature)
    shutil.copytree("recipes", tmp_path / "recipes")
    recipe = tmp_path / "recipes" / "sft.py"
    recipe.write_text(recipe.read_text().replace("peak_lr=1e-2", "peak_lr=1.0"))
    with pytest.raises(
        ValueError, match="run/sft holds a run with other settings: optimizer.peak_lr is 0.01 there and"
    ):
        demo(DemoConfig(run_dir="run", recipes=str(tmp_path / "recipes")), Console(file=io.StringIO()))


def test_a_reference_that_moves_takes_a_kl_term():
    with pytest.raises(ValueError, match="reference_every=3: without loss.kl_weight there is no reference"):
        GRPOConfig(reference_every=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PretrainData(seq_len="128"), "PretrainData.seq_len='128': expected int, got str"),  # pyright: ignore
        (lambda: PretrainData(skip_broken="no"), "skip_broken='no': expected bool"),  # pyright: ignore
        (lambda: SFTData(drop_long="no"), "SFTData.drop_long='no': expected bool"),  # pyright: ignore
        (lambda: CorpusConfig(vocab_size=1.5), "vocab_size=1.5: expected int"),  # pyright: ignore
        (lambda: StageConfig(run_dir="gs://bucket/run"), "run_dir='gs://bucket/run'.*local or mounted folder"),
    ],
)
def test_wrong_values_in_a_recipe_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
