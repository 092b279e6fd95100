"""Streaming: the pieces are the text, and no piece holds half a character."""

import pytest
from data.families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.special_tokens import SPECIAL_TOKENS
from deepseek_jax.data.streaming import TextStream
from deepseek_jax.data.tokenizer import Tokenizer

# Few merges reach these: nearly every character is several tokens.
characters = st.sampled_from("你好数字👩‍👩‍👧‍👦🇨🇳🙂é½𝔘\u0301\ufeff") | st.characters(codec="utf-8")
texts = st.lists(characters | st.sampled_from(SPECIAL_TOKENS), max_size=30).map("".join)


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    return [*map(stream.push, ids), stream.finish()]


@settings(max_examples=300)
@given(text=texts)
def test_no_piece_holds_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    parts = pieces(tokenizer, ids, False)
    assert "".join(parts) == text
    assert parts[-1] == "" and all("\ufffd" not in part for part in parts) or "\ufffd" in text
    # Each piece comes as early as it can: what is missing after n ids is less than a character.
    for n in range(len(ids)):
        assert tokenizer.decode(ids[: n + 1], skip_special_tokens=False).startswith("".join(parts[: n + 1]))


@settings(max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_any_ids_stream_to_what_decode_says(tokenizer, data, skip):
    """Also ids that are no UTF-8 together, special tokens in the middle of a character, ids past the vocabulary."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=40))
    assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200)
@given(data=st.data(), text=texts)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_together_bring_what_they_bring_one_by_one(family, data, text):
    ours = FAMILIES[family]()
    ids = ours.encode(text)
    singly, together = TextStream(ours), TextStream(ours)
    while ids:
        some = data.draw(st.integers(1, 9))
        assert together.push(*ids[:some]) == "".join(map(singly.push, ids[:some]))
        ids = ids[some:]
    assert together.finish() == singly.finish()


def test_a_character_comes_with_its_last_byte(tokenizer):
    ids = tokenizer.encode("🙂")
    assert len(ids) == 4
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂"]
    assert [stream.push(i) for i in ids[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd" and stream.finish() == ""
    assert stream.push(tokenizer.encode("a")[0]) == "a"


@settings(max_examples=200)
@given(data=st.data(), text=texts, skip=st.booleans())
@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_of_every_kind_stream(family, data, text, skip):
    """Decoders that strip, that join with spaces, that have single bytes as tokens."""
    ours = FAMILIES[family]()
    ids = [*ours.bos_ids, *ours.encode(text)]
    parts = pieces(ours, ids, skip)
    assert "".join(parts) == ours.decode(ids, skip_special_tokens=skip)
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text
    if family != "llama":  # whose bytes change one another where they are no UTF-8
        ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=20))
        assert "".join(pieces(ours, ids, skip)) == ours.decode(ids, skip_special_tokens=skip)


def test_bytes_of_a_llama_that_are_no_text_end():
    ours = FAMILIES["llama"]()
    spelled = ["▁the", *(f"<0x{byte:02X}>" for byte in "你".encode()), "<0xE4>", "▁the", "<0xBD>"]
    parts = pieces(ours, [ours.token_id(token) for token in spelled], False)
    assert parts == ["the", "", "", "你", "", "\ufffd\ufffd\ufffd the", "", "\ufffd"]


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_no_character_are_not_held_back(family):
    """However many: each token would be decoded with all before it, and one request stop a server that way."""
    ours = FAMILIES[family]()
    half = next((i for i in range(ours.vocab_size) if ours.decode([i], skip_special_tokens=False) == "\ufffd"), None)
    if half is None:
        pytest.skip("it has no half characters")
    stream = TextStream(ours)
    parts = [stream.push(half) for _ in range(100)]
    assert all(parts[4:]) and len(stream._window) < 10
    assert "".join(parts) + stream.finish() == ours.decode([half] * 100, skip_special_tokens=False)
