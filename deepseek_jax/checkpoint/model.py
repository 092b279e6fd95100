"""A model that travels whole: what ``load`` returns, what every stage starts from, ends with and saves."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.checkpoint.finding import CHECKPOINTS, find_model, is_released
from deepseek_jax.checkpoint.hf_load import KEPT_FP8, dtype_name, read_released, released_config
from deepseek_jax.checkpoint.integers import Integers, quantise_params
from deepseek_jax.checkpoint.reading import restore_params
from deepseek_jax.checkpoint.store import CheckpointStore
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.chat_templates import with_template
from deepseek_jax.data.model_folder import TOKENIZER
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model import parameters, transformer
from deepseek_jax.parallel.legal import check_layout
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import tree_shardings


@dataclasses.dataclass(frozen=True)
class Model:
    """What a network is, how it is computed, its arrays and where they live, and how it reads and writes text.

    tokenizer: with its chat template and stop ids; None where a released folder has none.
    """

    config: ModelConfig
    compute: ComputeConfig
    params: Any
    router_bias: jax.Array | None
    tokenizer: Tokenizer | None
    mesh: Mesh

    @classmethod
    def of(cls, network: transformer.Transformer, tokenizer: Tokenizer | None = None) -> "Model":
        """A module as a model on the mesh that its arrays lie on, else on one device; no array is copied."""
        params, router_bias = parameters.split(network)
        places = (leaf.sharding for leaf in jax.tree.leaves(params))
        meshes = (place.mesh for place in places if isinstance(place, NamedSharding))
        mesh = next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None) or _one_device()
        return cls(network.config, network.compute.on(mesh), params, router_bias, tokenizer, mesh)

    def network(self) -> transformer.Transformer:
        """The network as a module; no array is copied."""
        return parameters.merge(self.config, self.params, self.router_bias, self.compute)

    def __call__(self, tokens_BS: jax.Array, **options: Any) -> transformer.ModelOutput:
        """``Transformer.__call__`` on the model's mesh."""
        with jax.set_mesh(self.mesh):
            return self.network()(tokens_BS, **options)

    @property
    def text(self) -> Tokenizer:
        """The tokenizer, for ids that the model has rows for. ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError(f"this model came without {TOKENIZER}, which reading and writing text takes")
        return self.tokenizer.over(self.config.vocab_size)

    def asked_by(self, chat_template: str) -> "Model":
        """The model with another chat template than its own, see ``data.chat_templates``; "": as it is."""
        return dataclasses.replace(self, tokenizer=with_template(self.text, chat_template)) if chat_template else self


def read_config(path: str | Path, *, step: int | None = None, ignore_config: tuple[str, ...] = ()) -> ModelConfig:
    """The network in a run's folder or in a released one, as ``load`` would find it; no array is read."""
    path = find_model(path)
    if is_released(path):
        return released_config(path, ignore_config)
    with CheckpointStore(path / CHECKPOINTS, keep=1) as store:
        return ModelConfig.from_dict(store.read_meta(step)["model"])


def load(
    path: str | Path,
    *,
    compute: ComputeConfig = ComputeConfig(),
    mesh: Mesh | None = None,
    step: int | None = None,
    ema: bool = False,
    ignore_config: tuple[str, ...] = (),
) -> Model:
    """The model in a run's folder or in a released one, its parameters in ``compute.param_dtype`` on ``mesh``.

    Args:
      path: as ``find_model`` takes it.
      mesh: by default one device.
      step, ema: of a run, a checkpoint other than the newest, and the running mean in place of the parameters.
      ignore_config: of a released folder, fields of config.json to pass over, see ``ModelConfig.from_hf``.

    An MTP module that only one of a released config.json and its files knows of is left out with a warning.

    Raises FileNotFoundError where there is neither, see ``find_model``, ValueError for what is damaged, unknown or not
    to be had.
    """
    path, mesh = find_model(path), mesh or _one_device()
    compute = compute.on(mesh)
    if is_released(path):
        if step is not None or ema:
            raise ValueError(f"{path} is a released model: it has no other steps and no running mean")
        tokenizer = Tokenizer.from_folder(path) if (path / TOKENIZER).is_file() else None  # fails sooner than weights
        config, params, router_bias = read_released(path, compute, mesh, ignore_config)
        return Model(config, compute, params, router_bias, tokenizer, mesh)
    if ignore_config:
        raise ValueError(f"ignore_config={ignore_config}: it is for a released model's config.json, and {path} is none")
    return _load_run(path, compute, mesh, step, ema)


def load_hf(
    path: str | Path, *, mesh: Mesh | None = None, dtype: Any = jnp.bfloat16, ignore_config: Sequence[str] = ()
) -> transformer.Transformer:
    """``load`` for who wants the network alone, as a module.

    Args:
      dtype: bfloat16 or float32, of parameters and arithmetic; FP8 checkpoints are dequantised to it. "float8_e4m3"
        keeps their FP8 matrices and scales as they are (``BlockScaled``), "int8" and "int4" quantise matrices, for
        inference in bfloat16.
    """
    name = dtype_name(dtype)
    compute = ComputeConfig(dtype="float32" if name == "float32" else "bfloat16", param_dtype=cast(Any, name))
    network = load(path, compute=compute, mesh=mesh, ignore_config=tuple(ignore_config)).network()
    network.source = str(Path(path).absolute())
    return network


def _one_device() -> Mesh:
    return make_mesh(devices=jax.local_devices()[:1])


def _load_run(path: Path, compute: ComputeConfig, mesh: Mesh, step: int | None, ema: bool) -> Model:
    folder = path / CHECKPOINTS
    tokenizer = Tokenizer.from_folder(path)
    if compute.param_dtype == KEPT_FP8:
        raise ValueError(f"param_dtype={compute.param_dtype!r}: {path} holds float32 parameters")
    if integers := Integers.named(compute.param_dtype):
        model = _load_run(path, dataclasses.replace(compute, param_dtype="bfloat16"), mesh, step, ema)
        return dataclasses.replace(model, compute=compute, params=quantise_params(model.params, model.config, integers))
    with CheckpointStore(folder, keep=1) as store:
        meta = store.read_meta(step)
    config = ModelConfig.from_dict(meta["model"])
    if ema and not meta.get("recipe", {}).get("step", {}).get("ema_decay"):
        raise ValueError(f"{path} keeps no running mean of its parameters: step.ema_decay was 0")
    name = "ema" if ema else "params"
    check_layout(config, compute, mesh.shape)
    params, router_bias = parameters.abstract_arrays(config, compute)
    shardings = tree_shardings(mesh, parameters.logical_axes(config), params, compute.rules)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    wanted = {name: jax.tree.map(place, params, shardings)}
    if router_bias is not None:
        wanted["router_bias"] = place(router_bias, NamedSharding(mesh, PartitionSpec()))
    arrays, _ = restore_params(folder, wanted, step=step)
    return Model(config, compute, arrays[name], arrays.get("router_bias"), tokenizer, mesh)
