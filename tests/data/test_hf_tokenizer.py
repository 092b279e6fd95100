"""A released model's folder: its special tokens, what stands in front of raw text, what ends an answer."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from model.tiny import weights, whole
from small import SPEAKER

from deepseek_jax.data.chat import encode_prompt
from deepseek_jax.data.model_folder import read_sampling
from deepseek_jax.data.special_tokens import BOS, EOS
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams

R1 = Path(__file__).parents[3] / "shared/data/deepseek_r1_tokenizer"
GOLDEN = json.loads((Path(__file__).parent / "golden_templates.json").read_text(encoding="utf-8"))["cases"]
IM_END = "<|im_end|>"


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if not (R1 / "tokenizer.json.gz").is_file():
        pytest.skip("R1's tokenizer is not here: no shared/data/deepseek_r1_tokenizer beside the repository")
    folder = tmp_path_factory.mktemp("r1")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((R1 / "tokenizer.json.gz").read_bytes()))
    (folder / "tokenizer_config.json").write_bytes((R1 / "tokenizer_config.json").read_bytes())
    return Tokenizer.from_folder(folder)


@pytest.fixture
def write(tokenizer: Tokenizer, tmp_path: Path):
    """Writes a folder with an added token of another family's and reads it."""

    def made(config: dict[str, Any] | None = None, generation: dict[str, Any] | None = None) -> Tokenizer:
        content = json.loads(tokenizer.save(tmp_path).read_text())
        added = {"id": tokenizer.vocab_size, "content": IM_END, "special": True, "normalized": False}
        added |= {"single_word": False, "lstrip": False, "rstrip": False}
        content["added_tokens"].append(added)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        for name, value in (("tokenizer_config", config), ("generation_config", generation)):
            (tmp_path / f"{name}.json").unlink(missing_ok=True)
            if value is not None:
                (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return Tokenizer.from_folder(tmp_path)

    return made


@pytest.mark.parametrize("case", [c for c in GOLDEN if c["ids"]], ids=lambda case: case["name"])
def test_a_conversation_has_the_ids_that_transformers_gives_it(r1, case):
    text = r1.template.render(case["messages"], tools=case["tools"], add_generation_prompt=case["prompt"])
    assert r1.encode(text, allow_special=True) == case["ids"]


def test_r1s_folder(r1):
    """Its config says add_bos_token; as with transformers 5, `encode` adds none, and the engine puts it in front."""
    assert (r1.bos_ids, r1.eos_id, r1.pad_id, r1.stop_ids) == ([0], 1, 1, (1,))
    assert r1.encode("hi") == [6366]
    assert encode_prompt(r1, [{"role": "user", "content": "hi"}]) == [0, r1.user_id, 6366, r1.assistant_id]


def test_special_tokens_are_those_of_the_config(write):
    plain = write()
    assert (plain.bos_ids, plain.eos_id, plain.template) == ([plain.token_id(BOS)], plain.token_id(EOS), None)
    qwen = write({"bos_token": None, "eos_token": IM_END, "pad_token": EOS})
    assert qwen.bos_ids == [] and qwen.pad_id == plain.eos_id
    assert qwen.stop_ids == (qwen.eos_id,) == (qwen.token_id(IM_END),)
    with pytest.raises(ValueError, match="names no bos_token"):
        _ = qwen.bos_id
    bare = write({"tokenizer_class": "x"})
    assert (bare.bos_ids, bare.stop_ids, bare.pad_id) == ([], (), 0)


def test_the_generation_config_ends_answers_too(write):
    end = write().token_id(IM_END)
    config = {"bos_token": BOS, "eos_token": {"content": EOS}}
    assert write(config, {"eos_token_id": [end, 1]}).stop_ids == (1, end)
    assert write(config, {"eos_token_id": end}).stop_ids == (1, end)
    assert write(config, {}).stop_ids == write(config, {"eos_token_id": None}).stop_ids == (1,)
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id=\['x'\]"):
        write(config, {"eos_token_id": "x"})


def test_the_generation_config_says_how_to_draw(tmp_path):
    def said(**fields: Any) -> dict[str, Any]:
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
        return read_sampling(tmp_path)

    assert read_sampling(tmp_path) == said(eos_token_id=1) == {}
    given = said(do_sample=True, temperature=1, top_p=0.95, top_k=-1, min_p=None, max_length=20)
    assert given == {"temperature": 1.0, "top_p": 0.95, "top_k": 0}
    wrong: list[dict[str, Any]] = [{"temperature": x} for x in ("0.6", True, [1], math.inf, math.nan, 10**400)]
    for fields in [*wrong, {"top_k": 2.7}]:
        with pytest.raises(ValueError, match="generation_config.json: (temperature|top_k)=.*: expected a number"):
            said(**fields)


def test_without_a_generation_config_the_models_says_what_ends_answers(write, tmp_path):
    fields = {"bos_token_id": 0, "eos_token_id": [1, 7], "pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "llama"}))
    read = write({"bos_token": BOS, "eos_token": EOS})
    assert read.stop_ids == (1, 7) and read.files.ids == fields
    read.save(tmp_path / "run")  # where a config.json of another kind may stand
    assert json.loads((tmp_path / "run/generation_config.json").read_text()) == fields
    assert Tokenizer.from_folder(tmp_path / "run").stop_ids == (1, 7)


def test_all_files_about_text_travel_byte_for_byte(write, tmp_path):
    write({"bos_token": BOS, "eos_token": EOS, "chat_template": "old"}, {"eos_token_id": 1, "top_p": 0.95})
    for name in ("special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}  \n")
    (tmp_path / "modeling_deepseek.py").write_text("no code")
    read = Tokenizer.from_folder(tmp_path)
    read.save(tmp_path / "run")
    written = {file.relative_to(tmp_path / "run") for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert len(written) == 6
    for name in written:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_what_is_wrong_in_a_folder_is_named(write, tmp_path):
    with pytest.raises(ValueError, match="bos_token='<s>' is not in tokenizer.json"):
        write({"bos_token": "<s>"})
    for wrong in (7, {"text": "x"}, {"content": 7}):
        with pytest.raises(ValueError, match="eos_token=.* is neither a text nor"):
            write({"eos_token": wrong})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json: not JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Riddle"}}')
    with pytest.raises(ValueError, match="tokenizer.json: no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


def test_the_engine_puts_in_front_what_the_tokenizer_has():
    """The same text with and without a bos_token; and a tokenizer's stop ids end the answer."""
    from small import tokenizer

    ours = tokenizer()
    backend = tokenizers.Tokenizer.from_str(ours._special.to_str())
    greedy = SamplingParams(temperature=0.0, max_tokens=6)

    def answer(speaker: Tokenizer, prompt: str | list[int]) -> list[int]:
        return Engine(whole(SPEAKER, *weights(SPEAKER), speaker)).generate([prompt], greedy)[0].token_ids

    without = Tokenizer(backend, bos=None, eos=None, pad=None)
    ids = ours.encode("def")
    assert answer(ours, "def") == answer(without, [ours.bos_id, *ids])
    free = answer(without, "def")
    assert free == answer(without, ids) and len(free) == 6
    stopping = Tokenizer(backend, bos=None, eos=None, pad=None, stop_ids=[free[2]])
    assert answer(stopping, "def") == free[: free.index(free[2]) + 1]
