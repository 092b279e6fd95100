"""``config.json`` of the released models to the fields of a ``ModelConfig`` and back: plain values both.

Every field of a ``config.json`` is read, or changes nothing, or is refused by name: by the tables of ``hf_families``
and, where an architecture's has none, by ``hf_fields``. Rotary settings and quantisation, objects with fields of their
own, are read by ``hf_rotary`` and ``hf_quantisation``.
"""

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepseek_jax import hf_fields
from deepseek_jax.hf_families import (
    EXPERTS,
    FAMILIES,
    GQA,
    GROUPS,
    MLA,
    NULL_MEANS_ZERO,
    ROTARY,
    SCALING,
    Family,
)
from deepseek_jax.hf_quantisation import not_read
from deepseek_jax.hf_rotary import rotary_fields, scaling_content

Source = Mapping[str, Any] | str | os.PathLike[str]


def fields_of(source: Source, *, ignore_config: Iterable[str] = ()) -> dict[str, Any]:
    """The network that a ``config.json`` describes, as fields of ModelConfig, which has yet to check their values.

    Args:
      source: its content, its path, or the folder that holds it.
      ignore_config: fields taken as absent (``rope_scaling.truncate`` for one inside another), whatever that does.

    FileNotFoundError: no such file. ValueError: not a JSON object; an unknown architecture; a required field missing;
    a field that asks for something that is not computed here, by name and value. Fields that say nothing of the network
    are passed over, those that nobody knows with a warning.
    """
    if isinstance(ignore_config, str):
        raise ValueError(f"ignore_config={ignore_config!r}: give a list of field names")
    found = _without(_read(source), set(ignore_config))
    model_type = _model_type(found)
    family = FAMILIES[model_type]
    refused, told = _not_computed(family, found)
    refused += not_read(found.get("quantization_config"))
    if refused:
        raise ValueError(
            f"config.json ({model_type}) asks for what is not computed here: {'; '.join(refused)}. Fields named in "
            "ignore_config are taken as absent"
        )
    if told:
        message = f"config.json ({model_type}): passed over as saying nothing of the network: {', '.join(told)}"
        warnings.warn(message, stacklevel=3)
    values = {**family.absent, **_without_nulls(found)}
    if "head_dim" in family.reads:
        values = _head_widths(model_type, values)
    reads = _needed(family, values)
    missing = [name for name in reads if name not in values]
    if missing:
        raise ValueError(f"config.json ({model_type}) lacks {', '.join(missing)}")
    settings = dict(family.fixed) | {name: values[name] for name in reads}
    if not settings["n_routed_experts"]:
        settings["first_k_dense_replace"] = settings["num_hidden_layers"]
    if family.classifier in (found.get("architectures") or []):
        # What transformers leaves in the file of the language model that it began as.
        settings |= {"num_labels": _labels(found), "num_nextn_predict_layers": 0, "tie_word_embeddings": False}
    return settings | rotary_fields(found)


@contextmanager
def naming(source: Source) -> Iterator[None]:
    """Let errors about a file name it."""
    try:
        yield
    except ValueError as error:
        message = str(error).removeprefix("config.json").removeprefix(": ")
        if isinstance(source, Mapping) or str(_file(source)) in message:
            raise
        raise ValueError(f"{_file(source)}{'' if message.startswith(' (') else ': '}{message}") from error


def content_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``config.json`` from which ``fields_of`` and transformers make this network: all fields of a
    ModelConfig, those that do nothing at their defaults.

    Token ids, stored types and quantisation are the caller's to add. YaRN is written with both ``mscale`` and
    ``mscale_all_dim``; where one is zero, transformers and the released code multiply cosines by different factors
    from the same file, so ``attention_factor`` is written too, which makes transformers follow the released code.
    ValueError: no released architecture computes this; names the fields.
    """
    model_type = _nearest_type(fields)
    family = FAMILIES[model_type]
    labels = {str(label): f"LABEL_{label}" for label in range(fields["num_labels"])}
    architecture = family.classifier if labels else family.architecture
    content: dict[str, Any] = {"architectures": [architecture], "model_type": model_type}
    if labels:  # transformers counts them
        content |= {"id2label": labels, "label2id": {label: int(number) for number, label in labels.items()}}
    content |= {name: allowed[0] for name, allowed in family.only.items()}
    content |= {name: fields[name] for name in family.reads}
    if fields["attention"] == "mla":
        content |= {"q_lora_rank": fields["q_lora_rank"] or None, "num_key_value_heads": fields["num_attention_heads"]}
    content |= {"rope_theta": fields["rope_theta"], "rope_scaling": scaling_content(fields["rope_scaling"])}
    lost = [name for name, value in family.fixed.items() if fields[name] != value]
    lost += [name for name in family.reads if name in family.only and content[name] not in family.only[name]]
    if fields["num_nextn_predict_layers"] and not fields["n_routed_experts"]:
        lost.append("n_routed_experts")  # the module behind the last layer would have experts
    if lost:
        spelled = ", ".join(f"{name}={fields[name]!r}" for name in lost)
        raise ValueError(f"no released architecture computes this: {model_type}, the nearest, cannot say {spelled}")
    return content


def essential(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of ModelConfig's fields those that do something in the network."""
    idle = [*GQA] if fields["attention"] == "mla" else [name for name in MLA if name != "attention_bias"]
    changes: dict[str, Any] = {}
    if not fields["n_routed_experts"] or fields["first_k_dense_replace"] >= fields["num_hidden_layers"]:
        idle += ["scoring", "topk_method", *GROUPS, "norm_topk_prob", "routed_scaling_factor", *EXPERTS]
        changes = {"n_routed_experts": 0, "first_k_dense_replace": fields["num_hidden_layers"]}
    elif fields["topk_method"] == "greedy":
        changes = dict.fromkeys(GROUPS, 1)
    scaling = fields["rope_scaling"]
    changes["rope_scaling"] = {name: scaling[name] for name in ("type", *SCALING[scaling["type"]])}
    return {name: value for name, value in fields.items() if name not in idle} | changes


def _read(source: Source) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    path = _file(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def _file(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    return path / "config.json" if path.is_dir() else path


def _without(values: Mapping[str, Any], ignored: set[str], prefix: str = "") -> dict[str, Any]:
    """A copy without the ignored fields, those inside others named with a dot."""
    return {
        name: _without(value, ignored, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in values.items()
        if prefix + name not in ignored
    }


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    read = {name: 0 if value is None and name in NULL_MEANS_ZERO else value for name, value in values.items()}
    return {name: value for name, value in read.items() if value is not None}


def _model_type(found: Mapping[str, Any]) -> str:
    """The family: by ``model_type``, or by the architecture of V3, which other models have under names of their own."""
    name, architectures = str(found.get("model_type")), found.get("architectures") or []
    v3 = FAMILIES["deepseek_v3"].architecture
    if not isinstance(architectures, list):
        raise ValueError(f"config.json: architectures={architectures!r} is not a list")
    if name not in FAMILIES and v3 in architectures:
        return "deepseek_v3"
    if name not in FAMILIES:
        raise ValueError(
            f"config.json: model_type={name!r}, architectures={architectures!r}; known are the types "
            f"{', '.join(FAMILIES)} and any other whose architectures name {v3}"
        )
    known = FAMILIES[name].architecture, FAMILIES[name].classifier
    if architectures and not set(known) & set(architectures):
        raise ValueError(
            f"config.json: architectures={architectures!r}; of model_type={name!r} only {' and '.join(known)} are "
            "known (ignore_config=['architectures'] takes it for the first)"
        )
    return name


def _labels(found: Mapping[str, Any]) -> int:
    """How many scores a classifier gives: transformers writes their names, or nothing where they are two."""
    names, count = found.get("id2label"), found.get("num_labels", 2)
    count = len(names) if isinstance(names, Mapping) else count
    if type(count) is not int or count < 1:
        raise ValueError(f"config.json: num_labels={count!r}: a classifier has at least one")
    return count


def _not_computed(family: Family, found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(What to refuse, since it changes what is computed, with values; names of fields that nobody knows)."""
    refused, told = [], []
    passed = {*family.reads, *family.inert, *ROTARY} - family.only.keys()
    for name, value in found.items():
        if value is None or name in passed:
            continue
        if name == "layer_types":
            full = isinstance(value, list) and all(kind == "full_attention" for kind in value)
            verdict = hf_fields.INERT if full else "only 'full_attention'"
        elif allowed := family.only.get(name, (family.fixed[name],) if name in family.fixed else ()):
            verdict = hf_fields.checked(value, allowed)
        else:
            verdict = hf_fields.verdict(name, value)
        if verdict == hf_fields.UNKNOWN:
            told.append(name)
        elif verdict != hf_fields.INERT:
            refused.append(f"{name}={value!r} ({verdict})")
    return refused, told


def _head_widths(model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    """Grouped-query attention's two widths where they are left out: every head its own keys, heads that fill D.

    qwen2 is different: transformers takes an absent ``num_key_value_heads`` for 32, so it has to be there.
    """
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    if heads is None or width is None:
        return values
    if model_type != "qwen2":
        values = {"num_key_value_heads": heads} | values
    if "head_dim" not in values:
        if not (isinstance(heads, int) and heads > 0 and isinstance(width, int) and width % heads == 0):
            raise ValueError(f"config.json: num_attention_heads={heads!r} does not divide hidden_size={width!r}")
        values = values | {"head_dim": width // heads}
    return values


def _needed(family: Family, values: Mapping[str, Any]) -> list[str]:
    """Fields to read: those of experts where there are experts, those of groups where groups are chosen."""
    idle: set[str] = set()
    if "n_routed_experts" in family.reads and values.get("n_routed_experts") == 0:
        idle = {*EXPERTS, *GROUPS, "topk_method", "norm_topk_prob", "routed_scaling_factor"}
    elif values.get("topk_method") == "greedy":
        idle = set(GROUPS)
    return [name for name in family.reads if name not in idle]


def _nearest_type(fields: Mapping[str, Any]) -> str:
    if fields["attention"] == "gqa" and fields["n_routed_experts"]:
        return "deepseek"
    if fields["attention"] == "gqa":
        return "qwen2" if fields["attention_bias"] else "llama"
    return "deepseek_v3" if fields["scoring"] == "sigmoid" else "deepseek_v2"
