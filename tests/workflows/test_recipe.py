"""Recipes: found by name or file, and refused with a message where they are none."""

import dataclasses
from pathlib import Path

import pytest

from deepseek_jax.rl.tasks import TASKS
from deepseek_jax.workflows.demo import RECIPE_DIR, CorpusStage
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData
from deepseek_jax.workflows.recipe import find_recipe, load_recipe, moved
from deepseek_jax.workflows.sft import SFTConfig

DEMO = {
    "demo/corpus": CorpusStage,
    "demo/pretrain": PretrainConfig,
    "demo/sft": SFTConfig,
    "demo/grpo": GRPOConfig,
}
OPTIMIZER = "from deepseek_jax.train.optimizer import OptimizerConfig\n"


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", DEMO)
def test_the_demos_recipes_load_by_name(name):
    load_recipe(name, DEMO[name])
    docstring = find_recipe(name).read_text(encoding="utf-8").split('"""')[1]
    assert f"deepseek-jax {name.split('/')[1]} {name}" in docstring


# HumanEval and IFEval are benchmarks, asked beside others and not trained on; programs are trained on by recipe code.
@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("humaneval", "ifeval", "programs")])
def test_tasks_are_recipes(name):
    """The user gives the model and the rows, and other rewards if they like."""
    config = load_recipe(name, GRPOConfig)
    assert config.task.name == config.evaluation.task.name == name
    assert not (config.init_from or config.task.path or config.evaluation.task.path or config.reward)
    docstring = find_recipe(name).read_text(encoding="utf-8").split('"""')[1]
    assert f"deepseek-jax grpo {name} --init-from DIR --task.path" in docstring


def test_the_demos_stages_fit_together():
    """Each starts from what the one before wrote, and all paths lie under the folder that is moved."""
    corpus, pretrain, sft, grpo = (load_recipe(name, kind) for name, kind in DEMO.items())
    assert sft.init_from == pretrain.run_dir and grpo.init_from == sft.run_dir
    assert Path(pretrain.data.tokenizer).parent == Path(corpus.folder)
    assert pretrain.model.vocab_size >= corpus.corpus.vocab_size
    for config in (corpus, pretrain, sft, grpo):
        elsewhere = moved(config, RECIPE_DIR, "/tmp/x")
        assert RECIPE_DIR not in str(elsewhere) and "/tmp/x/" in str(elsewhere)
        assert moved(elsewhere, "/tmp/x", RECIPE_DIR) == config


def test_moving_touches_paths_only():
    data = PretrainData(path=("runs/demo/corpus/documents/train.jsonl",))
    config = PretrainConfig(run_dir="runs/demolition/a", data=data, seed=3)
    changed = moved(config, "runs/demo", "elsewhere")
    assert changed.run_dir == "runs/demolition/a"
    assert changed.data.path == ("elsewhere/corpus/documents/train.jsonl",)
    assert dataclasses.replace(changed, data=config.data) == config


def test_a_file_is_a_recipe(tmp_path):
    text = (
        "from deepseek_jax.workflows.pretrain import PretrainConfig\ndef config():\n    return PretrainConfig(seed=7)\n"
    )
    assert load_recipe(write(tmp_path, text), PretrainConfig).seed == 7


def test_a_folder_here_has_recipes(tmp_path, monkeypatch):
    """`demo --recipes mine` takes mine/pretrain.py and the others."""
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", "def config():\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine/recipe", int) == 1
    assert load_recipe(str(tmp_path / "mine" / "recipe"), int) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\n", r"recipe\.py is no recipe: it defines no function config\(\)"),
        ("config = 5\n", r"defines no function config\(\)"),
        ("def config(:\n", r"recipe\.py is no recipe: .* in line 1"),
        ("def config():\n    return 5\n", r"recipe\.py gives a int; this command takes a PretrainConfig"),
        (f"{OPTIMIZER}def config():\n    return OptimizerConfig(peak_lr='fast')\n", "peak_lr='fast': expected float"),
        (f"{OPTIMIZER}def config():\n    return OptimizerConfig(peak_learning_rate=1.0)\n", "peak_learning_rate"),
        ("import no_such_module\n", r"recipe\.py.*no_such_module.* in line 1"),
        ("def config():\n    return missing\n", r"NameError: .*'missing'.* in line 2"),
        ("x = {}['key']\n", r"KeyError: 'key' in line 1"),
    ],
    ids=["no_config", "not_callable", "syntax", "wrong_kind", "wrong_type", "unknown_field", "missing_module"]
    + ["unknown_name", "missing_key"],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, text), PretrainConfig)


def test_a_name_that_does_not_exist_lists_those_that_do(tmp_path):
    said = "no recipe 'demo/pretrian': did you mean demo/pretrain. give .*demo/corpus, .*demo/pretrain, demo/sft"
    with pytest.raises(ValueError, match=said):
        load_recipe("demo/pretrian", PretrainConfig)
    (tmp_path / "notes.md").write_text("# no recipe\n")
    with pytest.raises(ValueError, match="no recipe .*notes.md"):
        load_recipe(str(tmp_path / "notes.md"), PretrainConfig)
