"""``quantization_config`` of a ``config.json``: which stored numbers are read here."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.hf_families import PACKED, QUANTISATION
from deepseek_jax.hf_fields import among


def not_read(quantisation: Any) -> list[str]:
    """What to refuse of ``quantization_config``: all but e4m3 in 128×128 blocks, and int8 or int4 in groups."""
    if quantisation is None or quantisation == {}:
        return []
    if not isinstance(quantisation, Mapping):
        return [f"quantization_config={quantisation!r} (not an object)"]
    if quantisation.get("quant_method") == PACKED:
        return _not_integers(quantisation)
    given = {name: value for name, value in quantisation.items() if value is not None}
    refused = [
        f"quantization_config.{name} is missing" for name in ("quant_method", "weight_block_size") if name not in given
    ]
    for name, value in given.items():
        allowed = QUANTISATION.get(name, ())
        if allowed is not None and not among(list(value) if isinstance(value, tuple) else value, allowed):
            wanted = f"only {' or '.join(map(repr, allowed))}" if allowed else "unknown"
            refused.append(f"quantization_config.{name}={value!r} ({wanted})")
    return refused


def _not_integers(quantisation: Mapping[str, Any]) -> list[str]:
    """The same of compressed-tensors: weights alone, packed, symmetric, in groups whose terms lie side by side."""
    where = "quantization_config"
    refused = [
        f"{where}.{name}={quantisation.get(name)!r} (only {wanted!r})"
        for name, wanted in {"format": "pack-quantized", "quantization_status": "compressed"}.items()
        if quantisation.get(name, wanted) != wanted
    ]
    refused += [f"{where}.{name}={quantisation[name]!r}" for name in ("kv_cache_scheme",) if quantisation.get(name)]
    groups = quantisation.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return [*refused, f"{where}.config_groups={groups!r} (only one group of layers)"]
    [(name, group)] = groups.items()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return [*refused, f"{where}.config_groups.{name}={group!r} (only quantised weights)"]
    inside = f"{where}.config_groups.{name}.weights"
    only = {"num_bits": (4, 8), "type": ("int",), "strategy": ("group",), "symmetric": (True,), "actorder": (None,)}
    for field, allowed in only.items():
        if (value := weights.get(field, None if field == "num_bits" else allowed[0])) not in allowed:
            refused.append(f"{inside}.{field}={value!r} (only {' or '.join(map(repr, allowed))})")
    size = weights.get("group_size")
    if type(size) is not int or size < 2 or size % 2:
        refused.append(f"{inside}.group_size={size!r} (only an even number of terms)")
    of_rows = [field for field in ("input_activations", "output_activations") if group.get(field)]
    return refused + [f"{where}.config_groups.{name}.{field}={group[field]!r} (only null)" for field in of_rows]
