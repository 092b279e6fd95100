"""/openapi.json with the limits of this very server: who makes bodies from it makes some that are taken."""

import copy
from typing import Any

from fastapi import FastAPI

from deepseek_jax.serve.responding import Desk


def describe_limits(app: FastAPI, desk: Desk) -> None:
    """Have the app's OpenAPI say them."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        told = copy.deepcopy(plain())
        if desk.asker.state != "loading":
            for body in told["components"]["schemas"].values():
                for name, field in body.get("properties", {}).items():
                    _limit(name, field, desk)
            for path in told["paths"].values():
                for parameter in path.get("get", {}).get("parameters", ()):
                    _limit(parameter["name"], parameter["schema"], desk)
        return told

    app.openapi = described


def _limit(name: str, field: dict[str, Any], desk: Desk) -> None:
    served, limits = desk.asker.served, desk.config.limits
    if name == "model":
        field["enum"] = [served.name]
    if name in ("content", "prompt", "messages") and "anyOf" in field:  # of null nothing can be said
        field["anyOf"] = [kind for kind in field["anyOf"] if kind.get("type") != "null"]
    most = limits.max_tokens or served.context
    numbers = {"n": limits.n, "max_tokens": most, "max_completion_tokens": most, "max_output_tokens": most}
    lists = {"stop": limits.stops, "messages": limits.messages, "tools": limits.tools, "prompt": limits.n}
    for kind in field.get("anyOf", [field]):
        if name in numbers and kind.get("type") == "integer":
            kind["maximum"] = numbers[name]
        if name in lists and kind.get("type") == "array" and kind["items"].get("type") != "integer":
            kind["maxItems"] = lists[name]
        if name == "stop":
            kind.get("items", kind)["maxLength"] = limits.stop_length
        if name in ("prompt", "tokens", "stop_token_ids"):
            _limit_ids(kind, served.vocab_size)


def _limit_ids(kind: dict[str, Any], size: int) -> None:
    if kind.get("type") == "integer":
        kind.pop("exclusiveMaximum", None)
        kind["maximum"] = size - 1
    elif "items" in kind:
        _limit_ids(kind["items"], size)
