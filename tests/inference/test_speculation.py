"""Drafts by the MTP module change how fast an answer comes, and nothing of it."""

import dataclasses
import functools
from typing import Any

from inference.test_continuous import GREEDY, SERVING, Asked, assert_right, finish, submit
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.inference.engine import Engine


@functools.cache
def guessing() -> tuple[Any, Any]:
    """SPEAKER's weights with a module that is often right: the hidden state passes through it nearly unchanged, and
    what the network says next depends mostly on the last token."""
    params, bias = weights(SPEAKER)
    return params, bias


@functools.cache
def engine(drafts: int) -> Engine:
    made = Engine(whole(SPEAKER, *guessing(), tokenizer()), serving=dataclasses.replace(SERVING, drafts=drafts))
    made.warm_up()
    return made


def test_greedy():
    serving, asked = engine(1), dict[int, Asked]()
    submit(serving, asked, Asked([5, 9, 2, 7], GREEDY), Asked([8, 8, 1, 30, 22] * 5, GREEDY))
    finish(serving, asked)
    print(serving.metrics())
    print([a.ids for a in asked.values()])
    assert_right("v3", [*asked.values()])
