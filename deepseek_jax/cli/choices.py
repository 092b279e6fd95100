"""Options with a choice, where a word that others use for one is answered with how it is written here."""

import typing
from typing import Literal

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from deepseek_jax.typed import OTHERWISE, written_here

registry = ConstructorRegistry()  # while it is entered, tyro goes by it


@registry.primitive_rule
def _choice(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    choices = typing.get_args(info.type)
    if typing.get_origin(info.type) is not Literal or not any(word in choices for word, _ in OTHERWISE.values()):
        return None  # tyro's own, which refuses other words before a line of this could speak

    def chosen(words: list[str]) -> str:
        if words[0] not in choices:
            advice = written_here(words[0], choices)
            raise ValueError(f"{words[0]!r} is none of {', '.join(choices)}{advice and '; ' + advice}")
        return words[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=chosen,
        is_instance=lambda value: value in choices,
        str_from_instance=lambda value: [value],
    )
