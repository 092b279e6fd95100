"""What answering in the terminal takes, and ``generate``: completions of a trained stage or a released model."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jax.sharding import Mesh

from deepseek_jax.checkpoint.finding import described, expanded, find_model
from deepseek_jax.checkpoint.model import load
from deepseek_jax.cli.conversation import Turn, turn
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.data.chat import encode_prompt, prompt_opens_thinking
from deepseek_jax.data.chat_templates import check_template
from deepseek_jax.data.special_tokens import THINK
from deepseek_jax.data.tokenizer import whole_text
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.parallel.copies import read_placement
from deepseek_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from deepseek_jax.parallel.processes import gather, own_part, require_own_rows
from deepseek_jax.saying import say
from deepseek_kernels.target import Target


def _computed() -> ComputeConfig:
    """bfloat16, but for CPUs, which compute it slowly."""
    dtype = "float32" if Target.of(jax.devices()[0]).platform == "cpu" else "bfloat16"
    return ComputeConfig(dtype=dtype, param_dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Loading:
    """Which model, and where it lives."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A folder that a stage or the demo wrote (of a demo, its last stage answers), or a released model's, with
    config.json, safetensors and tokenizer.json."""
    step: int = 0
    """Of a run, a checkpoint other than the newest (0): the best one, for instance."""
    ema: bool = False
    """Of a run, the running mean of the parameters."""
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of a released model's config.json to take as absent; give it several times for more."""
    chat_template: str = ""
    """Another chat template than the model's own: r1_zero, which a base model is asked by, or a file of jinja2 text."""
    mesh: MeshConfig = MeshConfig(data=1)
    """Devices that answer together, by default one: expert and tensor split the weights, data, fsdp and expert the
    prompts. data=0: all devices, and so it is with several processes."""
    placement: str = ""
    """Where the experts stand, the busiest several times: a file that deepseek-jax place has written."""
    compute: ComputeConfig = dataclasses.field(default_factory=_computed)

    @property
    def folder(self) -> Path:
        return find_model(self.run)

    def check(self) -> None:
        """ValueError for what makes no sense, before a model is looked for."""
        check_template(self.chat_template)

    def engine(self, serving: ServingConfig = ServingConfig()) -> Engine:
        self.check()
        mesh = mesh_of(self.mesh)
        require_own_rows(mesh, self.compute.rules.batch, "answers")
        options: dict[str, Any] = {"compute": self.compute, "mesh": mesh, "step": self.step or None, "ema": self.ema}
        model = load(self.folder, **options, ignore_config=self.ignore_config)
        placement = read_placement(self.placement, model.config.num_dense_layers) if self.placement else None
        return Engine(model.asked_by(self.chat_template), placement=placement, serving=serving)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How answers are drawn."""

    temperature: float = 0.0
    """0 always takes the likeliest token; the same seed gives the same answers."""
    top_p: float = 1.0
    """Leave out what lies beyond this share of the probability."""
    top_k: int = 0
    """Choose among this many of the likeliest tokens; 0 for all."""
    max_tokens: int = 128
    """Of an answer."""
    seed: int = 0
    """Of what is drawn, where the temperature is not 0."""


@dataclasses.dataclass(frozen=True)
class Answering(Drawing, Loading):
    """Which model answers, and how."""

    def check(self) -> None:
        self.params()
        super().check()

    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            seed=self.seed,
        )


def mesh_of(config: MeshConfig) -> Mesh:
    """Over as many devices as its axes take, the first ones; over all where ``data`` takes what the others leave, as it
    does with several processes where it is not given."""
    if jax.process_count() > 1:
        return make_mesh(dataclasses.replace(config, data=0) if config.data == 1 else config)
    count = math.prod(getattr(config, axis) for axis in AXES)
    return make_mesh(config, jax.devices()[:count] if count else None)


@dataclasses.dataclass(frozen=True)
class _Generate(Answering):
    """Complete texts, or answer questions (--chat)."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to complete; give it several times for a batch."""
    chat: bool = False
    """The prompts are questions: ask them in the chat template."""


def run_generate(arguments: Sequence[str]) -> None:
    options = tyro.cli(_Generate, args=list(arguments), prog="deepseek-jax generate")
    if not options.prompt:
        raise ValueError("give at least one --prompt TEXT")
    options.check()
    if options.folder != expanded(options.run):
        say(f"{options.run}: {described(options.folder, options.step or None)} answers")
    engine = options.engine()
    prompts = starts = [whole_text(text) for text in options.prompt]  # starts: what is printed in front of each answer
    if options.chat:
        prompts, starts = zip(*(ask(engine, [turn("user", text)]) for text in prompts), strict=True)
    completed = [completion.text for completion in engine.generate(own_part(prompts), options.params())]
    texts = [text for part in gather(completed) for text in part]
    for start, text in zip(starts, texts, strict=True) if jax.process_index() == 0 else ():
        print(start + text)


def ask(engine: Engine, turns: Sequence[Turn]) -> tuple[list[int], str]:
    """The prompt's ids, and how the answer begins: with ``<think>`` where the prompt has opened it already."""
    tokenizer = engine.tokenizer
    return encode_prompt(tokenizer, turns), THINK if prompt_opens_thinking(tokenizer, turns) else ""
