"""What a model was taught of conversations: the rule, and that it travels with its tokenizer."""

import pytest
from small import tokenizer

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.turns import MANY, SINGLE, count_turns, known_turns, taught


@pytest.mark.parametrize(
    "known, turns, released, then",
    [
        (None, [1], False, SINGLE),
        (None, [1], True, None),  # it may have been taught many before it was released
        (None, [1, 2], True, MANY),
        (SINGLE, [1], False, SINGLE),
        (SINGLE, [1], True, SINGLE),
        (SINGLE, [3], False, MANY),
        (MANY, [1], False, MANY),
        (None, [], False, None),
    ],
)
def test_single_turns_teach_no_more_and_take_nothing_away(known, turns, released, then, tmp_path):
    before = tokenizer() if known is None else taught(tokenizer(), [1] if known == SINGLE else [2], released=False)
    after = taught(before, turns, released=released)
    assert (known_turns(before), known_turns(after)) == (known, then)
    after.save(tmp_path)
    assert known_turns(Tokenizer.from_folder(tmp_path)) == then
    assert after.fingerprint == before.fingerprint and known_turns(tokenizer()) is None


def test_turns_are_questions():
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert count_turns([{"role": role, "content": ""} for role in roles]) == 2
