"""Rotary settings of a ``config.json``, in either spelling, to ``rope_theta`` and ``rope_scaling`` and back."""

import math
from collections.abc import Mapping
from typing import Any

from deepseek_jax.hf_families import SCALING


def rotary_fields(found: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of ModelConfig from either spelling; ValueError where two disagree."""
    spelled = {name: found[name] for name in ("rope_scaling", "rope_parameters") if found.get(name)}
    thetas, scalings = {"rope_theta": found.get("rope_theta")}, {}
    for name, fields in spelled.items():
        if not isinstance(fields, Mapping):
            raise ValueError(f"config.json: {name}={fields!r} is not an object")
        thetas[f"{name}.rope_theta"] = fields.get("rope_theta")
        scalings[name] = _scaling(name, {key: value for key, value in fields.items() if key != "rope_theta"})
    thetas = {name: value for name, value in thetas.items() if value is not None}
    for what in (thetas, scalings):
        if any(value != next(iter(what.values())) for value in what.values()):
            raise ValueError(f"config.json contradicts itself: {', '.join(f'{k}={v!r}' for k, v in what.items())}")
    theta = next(iter(thetas.values()), 10000.0)  # transformers and all released code
    return {"rope_theta": theta, "rope_scaling": next(iter(scalings.values()), {"type": "none"})}


def _scaling(where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """One ``rope_scaling`` object. ``mscale`` and ``mscale_all_dim`` mean what they mean in the released code, see
    ``SCALING``; ``attention_factor``, which that code does not know, may only repeat what follows from them."""
    given = {name: value for name, value in fields.items() if value is not None}
    types = [given.pop(name) for name in ("type", "rope_type") if name in given] or ["default"]
    kind = "none" if types[0] == "default" else str(types[0])
    if types[0] != types[-1] or kind not in SCALING:
        raise ValueError(
            f"config.json: {where} of type {' and '.join(map(repr, types))}; known are 'default', 'yarn' and 'llama3'"
        )
    repeated = given.pop("attention_factor", None) if kind == "yarn" else None
    for name, inert in {"partial_rotary_factor": 1.0, "truncate": True}.items():
        if name in given and given[name] == inert:
            given.pop(name)
    values = {name: value for name, value in SCALING[kind].items() if value is not None} | given
    unknown = [f"{where}.{name}={value!r}" for name, value in given.items() if name not in SCALING[kind]]
    missing = [f"{where}.{name}" for name in SCALING[kind] if name not in values]
    if unknown:
        raise ValueError(f"config.json: {', '.join(unknown)} unknown with type {kind}; ignore_config can name it")
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing (type {kind})")
    if repeated is not None and all(isinstance(value, int | float) for value in values.values()):
        amplitude = _amplitude(values)
        if not (isinstance(repeated, int | float) and math.isclose(repeated, amplitude, rel_tol=1e-6)):
            raise ValueError(
                f"config.json: {where}.attention_factor={repeated!r}, but mscale={values['mscale']} and mscale_all_dim="
                f"{values['mscale_all_dim']} make it {amplitude}"
            )
    return {"type": kind} | values


def scaling_content(scaling: Mapping[str, Any]) -> dict[str, Any] | None:
    """``rope_scaling`` as it is written, from ModelConfig's."""
    if scaling["type"] == "none":
        return None
    # The old key, which the released MLA code asks for, and the one that Llama 3.1 came with.
    content: dict[str, Any] = {"type" if scaling["type"] == "yarn" else "rope_type": scaling["type"]}
    content |= {name: scaling[name] for name in SCALING[scaling["type"]]}
    if scaling["type"] == "yarn" and not (scaling["mscale"] and scaling["mscale_all_dim"]):
        content["attention_factor"] = _amplitude(scaling)
    return content


def _amplitude(scaling: Mapping[str, Any]) -> float:
    """What the released code multiplies cosines and sines by: ``m(mscale) / m(mscale_all_dim)``, ``m(x) = 0.1 x ln
    factor + 1``."""
    grown = math.log(max(scaling["factor"], 1.0))
    return (0.1 * scaling["mscale"] * grown + 1) / (0.1 * scaling["mscale_all_dim"] * grown + 1)
