"""``serve``: a model's answers over HTTP."""

import dataclasses
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from deepseek_jax.checkpoint.finding import is_released
from deepseek_jax.checkpoint.hf_load import integers_of
from deepseek_jax.checkpoint.integers import Integers
from deepseek_jax.checkpoint.model import read_config
from deepseek_jax.cli.talk import Loading, mesh_of
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.model_folder import GENERATION, read_sampling
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokenizer_training import made_up_tokenizer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.lowered import check_dtypes
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.saying import doing, say
from deepseek_jax.serve.asking import Served
from deepseek_jax.serve.config import ServeConfig
from deepseek_jax.serve.engine_process import HttpProcess, Stopping, run
from deepseek_jax.workflows.recipe import load_recipe


@dataclasses.dataclass(frozen=True)
class _Serve(Loading):
    """Answer over HTTP as OpenAI does, until Ctrl-C or SIGTERM: /v1/chat/completions, /v1/completions, /v1/responses,
    /v1/models, /health, /metrics, /tokenize, and a page at /. On this machine alone, unless --host says otherwise."""

    random: bool = False
    """PATH is a recipe instead (models/deepseek_v2_lite): its network with random weights, to be measured."""
    http: Annotated[ServeConfig, tyro.conf.arg(name="")] = ServeConfig()
    serving: ServingConfig = ServingConfig()

    def check(self) -> None:
        given = [name for name in ("step", "ema", "ignore_config", "placement") if getattr(self, name)]
        if self.random and given:
            raise ValueError(f"--random with {', '.join(given)}: these are of a model that is read")
        super().check()


def run_serve(arguments: Sequence[str]) -> None:
    asked = tyro.cli(_Serve, args=list(arguments), prog="deepseek-jax serve")
    asked.check()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs are many
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        config, tokenizer = _text(asked, stack)
        _check_dtype(asked)
        drawing = _drawing(tokenizer)
        if jax.process_index():  # the first process has HTTP
            engine = _engine(asked, config, tokenizer)
            _warm_up(engine)
            with Stopping():  # a signal is for the first
                engine.follow()
            return
        http = stack.enter_context(HttpProcess(dataclasses.replace(asked.http, name=asked.http.name or _name(asked))))
        if not (http.config.keys() or http.config.alone):
            say(f"whoever reaches {http.url} may ask it: --api-keys-file and $DEEPSEEK_JAX_API_KEYS ask for a key")
        http.start(tokenizer, asked.chat_template, config.vocab_size)
        with _timed("weights", seconds):
            engine = _engine(asked, config, tokenizer)
        http.check()
        with _timed("programs", seconds):
            _warm_up(engine)
        served = Served(http.config.name, engine.context, config.vocab_size, engine.slots, drawing)
        took = ", ".join(f"{what} {each:.1f} s" for what, each in seconds.items())
        ready = f"ready: {http.url}/v1 has {served.name}, of {served.context:,} tokens; {took}"
        with Stopping() as stopping:
            run(engine, http, served, stopping, lambda: say(ready))
        engine.end()


def _warm_up(engine: Engine) -> None:
    engine.warm_up()
    gc.collect()
    gc.freeze()  # what loading and tracing have left takes 0.2 s and more each time that it is looked through


def _name(asked: _Serve) -> str:
    return Path(asked.run).stem if asked.random else asked.folder.resolve().name


def _text(asked: _Serve, stack: ExitStack) -> tuple[ModelConfig, str]:
    """What the network is, and where its tokenizer lies."""
    if not asked.random:
        return read_config(asked.folder, step=asked.step or None, ignore_config=asked.ignore_config), str(asked.folder)
    recipe = load_recipe(asked.run, object)
    config = getattr(recipe, "model", recipe)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{asked.run} gives a {type(config).__name__}: --random takes a network or a pretraining")
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    made_up_tokenizer(config.vocab_size).save(folder)
    return config, folder


def _drawing(folder: str) -> dict[str, Any]:
    """How the model draws where a request says nothing. ValueError: its generation_config.json has what is none."""
    found = read_sampling(Path(folder))
    try:
        SamplingParams(**found)
    except ValueError as error:
        raise ValueError(f"{folder}/{GENERATION}: {error}") from error
    return found


def _check_dtype(asked: _Serve) -> None:
    """ValueError for weights that the engine could not have, before they are read."""
    folder = "" if asked.random else asked.folder
    integers = integers_of(folder, asked.compute.param_dtype) if folder and is_released(folder) else None
    integers = integers or Integers.named(asked.compute.param_dtype)
    check_dtypes([integers.dtype] if integers else [])


def _engine(asked: _Serve, config: ModelConfig, tokenizer: str) -> Engine:
    if not asked.random:
        return asked.engine(asked.serving)
    mesh = mesh_of(asked.mesh)
    return Engine.random(config, asked.compute, mesh, Tokenizer.from_folder(tokenizer), serving=asked.serving)


@contextmanager
def _timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    with doing(what):
        yield
    seconds[what] = time.perf_counter() - began
