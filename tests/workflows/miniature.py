"""The demo at a minute's scale: recipes of a few steps, and the command line as a program of its own."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]

RECIPES = {
    "corpus": """
from deepseek_jax.workflows.corpus import CorpusConfig
from deepseek_jax.workflows.demo import CorpusStage


def config():
    return CorpusStage(
        folder="runs/demo/corpus",
        corpus=CorpusConfig(
            vocab_size=300,
            kinds=("add",),
            max_code_bytes=20_000,
            max_file_bytes=4_000,
            sft_per_kind=20,
            train_per_kind=20,
            heldout_per_kind=8,
        )
    )
""",
    "pretrain": """
from deepseek_jax.config import ModelConfig
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData


def config():
    return PretrainConfig(
        run_dir="runs/demo/pretrain",
        model=ModelConfig(
            vocab_size=300,
            hidden_size=16,
            num_hidden_layers=2,
            intermediate_size=24,
            num_attention_heads=2,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            max_position_embeddings=128,
            initializer_range=0.1,
        ),
        data=PretrainData(
            path=("runs/demo/corpus/documents/train.jsonl",),
            heldout=("runs/demo/corpus/documents/heldout.jsonl",),
            tokenizer="runs/demo/corpus/tokenizer.json",
            seq_len=32,
        ),
        batch_size=4,
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=3),
        step=StepConfig(microbatches=2, ema_decay=0.9),
        loss=LanguageModelLoss(chunk=16),
        loop=LoopConfig(steps=24, log_every=1, checkpoint_every=5, eval_every=12, keep=1),
    )
""",
    "sft": """
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.workflows.sft import SFTConfig, SFTData
from deepseek_jax.workflows.task_eval import TaskEval


def config():
    held_in, heldout = (
        TaskConfig("arithmetic", path=(f"runs/demo/corpus/problems_{side}.jsonl",)) for side in ("train", "heldout")
    )
    return SFTConfig(
        run_dir="runs/demo/sft",
        init_from="runs/demo/pretrain",
        data=SFTData(path=("runs/demo/corpus/sft.jsonl",), heldout=("runs/demo/corpus/sft.jsonl",), seq_len=96),
        batch_size=4,
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=3, constant_until=1.0, cosine_until=1.0),
        step=StepConfig(bias_update_speed=0.003),
        loss=LanguageModelLoss(isolate=True, chunk=32),
        loop=LoopConfig(steps=40, log_every=1, checkpoint_every=6, eval_every=20),
        check=TaskEval(held_in, count=8, max_tokens=20, batch_size=8),
        evaluation=TaskEval(heldout, max_tokens=20, batch_size=8),
    )
""",
    "grpo": """
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.task_eval import TaskEval


def config():
    held_in, heldout = (
        TaskConfig("arithmetic", path=(f"runs/demo/corpus/problems_{side}.jsonl",)) for side in ("train", "heldout")
    )
    return GRPOConfig(
        run_dir="runs/demo/grpo",
        init_from="runs/demo/sft",
        task=held_in,
        rollout=RolloutConfig(prompts=2, group=4, max_prompt=9, max_tokens=20, patience=0),
        loss=GRPOLoss(chunk=16, kl_weight=0.01),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=0, constant_until=1.0, cosine_until=1.0),
        reference_every=4,
        loop=LoopConfig(steps=12, log_every=1, checkpoint_every=3, eval_every=6),
        inner_epochs=2,
        evaluation=TaskEval(heldout, max_tokens=20, batch_size=8, by="kind"),
    )
""",
}


def write_recipes(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in RECIPES.items():
        (folder / f"{name}.py").write_text(f'"""A few steps of {name}."""\n{text}', encoding="utf-8")
    return folder


def run_program(*program: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python program on one device, in the tests' environment, its warnings errors."""
    sources = os.pathsep.join([str(TESTS.parent), str(TESTS.parent / "kernels")])
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": sources}
    return subprocess.run(
        [sys.executable, "-W", "error", *program], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def run_demo(folder: Path, run: str, *before: str) -> subprocess.CompletedProcess[str]:
    """`deepseek-jax demo` into folder/run; `before` are killed.py and its first arguments."""
    command = before or ("-m", "deepseek_jax.cli.main")
    recipes = write_recipes(folder / "recipes")
    return run_program(*command, "demo", "--run-dir", run, "--recipes", str(recipes), cwd=folder)


def finished_demo(base: Path) -> Path:
    """A folder with recipes/ and a finished run/, made once for all workers of a session."""
    folder = base / "miniature"
    with open(base / "miniature.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            result = run_demo(folder, "run")
            assert result.returncode == 0, result.stderr
            (folder / "done").write_text(result.stdout, encoding="utf-8")
    return folder
