"""The tokenizer: exact round trips, no smuggled special tokens, R1's layout."""

import gzip
import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.special_tokens import BOS, EOS, EOT, PAD, PAD_ID, SPECIAL_TOKENS, THINK
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokenizer_training import train_tokenizer

R1 = Path(__file__).parents[3] / "shared/data/deepseek_r1_tokenizer/tokenizer.json.gz"

# Text in which special tokens, and parts of them, are common.
hostile = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*SPECIAL_TOKENS, "<｜", "▁", "<", "｜>"]))).map(
    "".join
)


@given(text=st.text())
def test_arbitrary_text_decodes_to_itself(tokenizer: Tokenizer, text: str) -> None:
    for skip in (True, False):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=skip) == text


@given(text=hostile)
def test_no_text_makes_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    special = {tokenizer.token_id(token) for token in SPECIAL_TOKENS}
    ids = tokenizer.encode(text)
    assert special.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


@given(text=hostile)
def test_with_permission_the_special_tokens_are_single_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, allow_special=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for token in SPECIAL_TOKENS:
        assert ids.count(tokenizer.token_id(token)) == text.count(token)


def test_every_digit_is_one_token(texts: list[str]) -> None:
    tokenizer = train_tokenizer([*texts, "777 777 777 12 12 12 " * 50], 400)
    for text in ("1234567890", "x=777", " 12 12", "a1b2", "3.14"):
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
        assert [p for p in pieces if any(c.isdigit() for c in p)] == [c for c in text if c.isdigit()]


def test_training_is_deterministic_and_uses_the_texts(texts: list[str]) -> None:
    first, second = train_tokenizer(texts, 320), train_tokenizer(iter(texts), 320)
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != train_tokenizer(texts, 310).fingerprint
    assert first.vocab_size == 320
    assert len(first.encode(texts[1])) < 0.7 * len(texts[1])


def test_layout_of_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_id(t) for t in SPECIAL_TOKENS[:3]] == [0, 1, 2] == [0, 1, PAD_ID]
    last = [tokenizer.token_id(t) for t in SPECIAL_TOKENS[3:]]
    assert last == list(range(tokenizer.vocab_size - len(last), tokenizer.vocab_size))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.decode([tokenizer.think_id, tokenizer.end_think_id]) == "<think></think>"
    assert tokenizer.decode([tokenizer.user_id, tokenizer.assistant_id]) == "<｜User｜><｜Assistant｜>"
    assert tokenizer.decode([tokenizer.token_id(t) for t in (BOS, EOS, PAD, EOT)]) == ""


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path, texts: list[str]) -> None:
    file = tokenizer.save(tmp_path / "run")
    written = {name: (tmp_path / "run" / name).read_bytes() for name in os.listdir(tmp_path / "run")}
    assert file == tmp_path / "run/tokenizer.json"
    assert written.keys() == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert json.loads(written["generation_config.json"]) == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    for path in (file, file.parent):
        loaded = Tokenizer.from_folder(path)
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.stop_ids) == (0, 1, 2, (1,))
        loaded.save(tmp_path / "again")
        assert {name: (tmp_path / "again" / name).read_bytes() for name in os.listdir(tmp_path / "again")} == written
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(texts[0]) == tokenizer.encode(texts[0])


def test_what_is_wrong_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/tokenizer\.json: no such tokenizer"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    packed = tmp_path / "tokenizer.json.gz"
    packed.write_bytes(b"")
    for path in (tmp_path, packed):
        with pytest.raises(ValueError, match=rf"is needed; gunzip -k {packed}$"):
            Tokenizer.from_folder(path)
    (tmp_path / "cut.json").write_text('{"model": {\n"typ')
    with pytest.raises(ValueError, match=r"cut\.json:2: not JSON"):
        Tokenizer.from_folder(tmp_path / "cut.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="no 'model'"):
        Tokenizer.from_folder(tmp_path / "other.json")
    with pytest.raises(ValueError, match="no token '<nothing>'"):
        tokenizer.token_id("<nothing>")
    with pytest.raises(ValueError, match="vocab_size=275 is too small.* 276"):
        train_tokenizer(["a"], 275)


@pytest.fixture(scope="module")
def r1_json() -> dict:
    if not R1.is_file():
        pytest.skip(f"R1's tokenizer is not here ({R1.relative_to(R1.parents[3])} beside the repository)")
    return json.loads(gzip.decompress(R1.read_bytes()))


def test_special_tokens_are_those_of_r1(r1_json: dict, tokenizer: Tokenizer) -> None:
    released = {t["content"]: t for t in r1_json["added_tokens"] if "place▁holder" not in t["content"]}
    assert tuple(released) == SPECIAL_TOKENS  # and in the order of R1's ids
    assert {t for t, entry in released.items() if entry["special"]} == {
        t for t in SPECIAL_TOKENS if tokenizer.decode([tokenizer.token_id(t)]) == ""
    }


def test_r1_loads_and_cannot_be_smuggled_into(r1_json: dict, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(r1_json))
    r1 = Tokenizer.from_folder(tmp_path)
    reference = tokenizers.Tokenizer.from_str(json.dumps(r1_json))
    assert r1.vocab_size == 128815
    assert (r1.bos_id, r1.eos_id, r1.pad_id, r1.think_id, r1.end_think_id) == (0, 1, 2, 128798, 128799)
    text = f"{THINK}2024 数字{EOS} def f(x):\n    return x"
    assert r1.encode(text, allow_special=True) == reference.encode(text, add_special_tokens=False).ids
    assert {r1.token_id(t) for t in SPECIAL_TOKENS}.isdisjoint(r1.encode(text))
    assert r1.decode(r1.encode(text)) == text


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["N"])))
def test_pre_tokenisation_without_digits_is_that_of_r1(r1_json: dict, tokenizer: Tokenizer, text: str) -> None:
    theirs = tokenizers.Tokenizer.from_str(json.dumps({**r1_json, "model": _no_merges(), "added_tokens": []}))
    ours = tokenizer._special.pre_tokenizer
    assert ours is not None and theirs.pre_tokenizer is not None
    assert ours.pre_tokenize_str(text) == theirs.pre_tokenizer.pre_tokenize_str(text)


def _no_merges() -> dict:
    return json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())["model"]
