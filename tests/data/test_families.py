"""Nothing of one family's tokens is taken for granted, and nothing that another program left in a file is obeyed."""

import json

import pytest
from data.families import CHATML, QWEN, llama, qwen, write_qwen
from model.tiny import V3, config, weights, whole
from small import tokenizer as demo_tokenizer

from deepseek_jax.data.chat import encode_chat, encode_prompt
from deepseek_jax.data.fim import FimTokens
from deepseek_jax.data.special_tokens import BOS, DEEPSEEK_TEMPLATE, EOS, PAD
from deepseek_jax.data.template import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokenizer_training import train_tokenizer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.workflows.pretrain import PretrainData, prepare_rows
from deepseek_jax.workflows.sft import SFTData, prepare_chats

CHAT = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
SPOKEN = "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"


def test_a_folder_without_pad_or_fim_packs_documents_and_chats(tmp_path):
    write_qwen(tmp_path / "qwen")
    (tmp_path / "text.txt").write_text("the quick brown fox")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}))
    ours = Tokenizer.from_folder(tmp_path / "qwen")
    assert (ours.pad_id, ours.eos_id, ours.bos_ids) == (2, 2, [])
    data = PretrainData(path=(str(tmp_path / "text.txt"),), fim_rate=0.0, seq_len=16)
    prepare_rows(data, ours, tmp_path / "rows", seed=0)
    chats = SFTData(path=(str(tmp_path / "chats.jsonl"),), seq_len=64)
    prepare_chats(chats, ours, tmp_path / "chats")
    with pytest.raises(ValueError, match="--data.fim-rate 0 trains without.*no token '<｜fim▁begin｜>'"):
        FimTokens.of(ours)


def test_a_run_reads_the_tokenizers_own_settings(tmp_path):
    ours = Tokenizer.from_folder(write_qwen(tmp_path / "qwen"))
    ours.save(tmp_path / "run")
    again = Tokenizer.from_folder(tmp_path / "run")
    assert (again.bos_ids, again.eos_id, again.pad_id, again.stop_ids) == ([], 2, 2, (2,))
    assert again.decode(encode_prompt(again, CHAT[:1]), skip_special_tokens=False) == SPOKEN


def test_without_settings_only_tokens_that_are_there_are_named(tmp_path):
    folder = write_qwen(tmp_path / "bare", config={})
    (tmp_path / "alone.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for path in (folder, tmp_path / "alone.json"):
        bare = Tokenizer.from_folder(path)
        assert (bare.bos_ids, bare.stop_ids, bare.pad_id, bare.encode("the")) == ([], (), 0, qwen().encode("the"))
        with pytest.raises(ValueError, match="names no eos_token"):
            _ = bare.eos_id
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [2, 0], "bos_token_id": 1}))
    named = Tokenizer.from_folder(folder)
    assert (named.bos_ids, named.eos_id, named.pad_id, named.stop_ids) == ([1], 2, 2, (2, 0))
    named.save(tmp_path / "run")  # where its names travel
    assert Tokenizer.from_folder(tmp_path / "run").bos_ids == [1]
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": QWEN[0]}}))
    assert Tokenizer.from_folder(folder).eos_id == 0


def test_each_token_is_named_by_the_first_file_that_says_anything_of_it(tmp_path):
    folder = write_qwen(tmp_path / "q", config={"tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": QWEN[0], "eos_token": QWEN[2]}))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    both = Tokenizer.from_folder(folder)
    assert (both.bos_id, both.eos_id, both.pad_id) == (0, 2, 1)
    both.save(tmp_path / "run")  # without the model's config.json
    again = Tokenizer.from_folder(tmp_path / "run")
    assert (again.bos_id, again.eos_id, again.pad_id, again.stop_ids) == (0, 2, 1, (2,))
    (folder / "special_tokens_map.json").unlink()
    assert Tokenizer.from_folder(folder).bos_id == 1
    write_qwen(folder, {"bos_token": None, "eos_token": QWEN[0], "pad_token": None})
    null = Tokenizer.from_folder(folder)
    assert (null.bos_ids, null.eos_id, null.pad_id) == ([], 0, 0)


def test_bos_stands_in_front_where_the_settings_have_it_so(tmp_path):
    names = {"bos_token": QWEN[0], "eos_token": QWEN[2]}
    for said, front in ({}, [0]), ({"add_bos_token": True}, [0]), ({"add_bos_token": False}, []):
        ours = Tokenizer.from_folder(write_qwen(tmp_path / "q", names | said))
        assert (ours.bos_ids, ours.bos_id) == (front, 0)
    bare = Tokenizer(qwen()._special, bos=QWEN[0], eos=QWEN[2], add_bos=False)
    bare.save(tmp_path / "bare")
    assert Tokenizer.from_folder(tmp_path / "bare").bos_ids == bare.bos_ids == []


def test_a_pad_that_the_vocabulary_lacks_is_none(tmp_path):
    assert Tokenizer.from_folder(write_qwen(tmp_path / "q", {"eos_token": QWEN[2], "pad_token": "[PAD]"})).pad_id == 2
    assert Tokenizer(qwen()._special, bos=None, eos=QWEN[0]).pad_id == 0  # nor the constructor's own


def test_truncation_and_padding_of_another_program_are_off(tmp_path):
    state = {
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
        | {"pad_type_id": 0, "pad_token": QWEN[0]},
    }
    ours = Tokenizer.from_folder(write_qwen(tmp_path / "q", **state))
    text = "the quick brown fox jumps over the lazy dog 12345"
    for special in (False, True):
        assert ours.encode(text, allow_special=special) == qwen().encode(text) and len(ours.encode(text)) > 8
        assert len(ours.encode("a", allow_special=special)) == 1
    assert ours.fingerprint == qwen().fingerprint
    ours.save(tmp_path / "run")
    assert (tmp_path / "run/tokenizer.json").read_bytes() == (tmp_path / "q/tokenizer.json").read_bytes()


@pytest.mark.parametrize("broken", ["caf\udce9", "caf\ud83d", "caf\udce9\udcff"])
def test_what_is_no_character_is_one_replacement_character(broken):
    for ours in (demo_tokenizer(), qwen(), llama()):
        for special in (False, True):
            assert ours.encode(broken + "!", allow_special=special) == ours.encode("caf\ufffd!", allow_special=special)
    asked = encode_prompt(demo_tokenizer(), [{"role": "user", "content": broken}])
    assert asked == encode_prompt(demo_tokenizer(), [{"role": "user", "content": "caf\ufffd"}])
    assert train_tokenizer([broken] * 3, 280).fingerprint == train_tokenizer(["caf\ufffd"] * 3, 280).fingerprint


def test_what_ends_answers_here_ends_them_in_a_saved_folder(tmp_path):
    """Where generation_config.json or config.json would have transformers stop elsewhere, or never."""

    def saved(generation: dict | None, model: dict) -> tuple:
        folder = write_qwen(tmp_path / "q")
        (folder / "config.json").write_text(json.dumps(model))
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        ours = Tokenizer.from_folder(folder)
        ours.save(tmp_path / "out")
        return ours.stop_ids, json.loads((tmp_path / "out/generation_config.json").read_text())

    assert saved(None, {}) == ((2,), {"eos_token_id": 2})
    assert saved({"temperature": 0.6}, {"eos_token_id": 0}) == ((2, 0), {"temperature": 0.6, "eos_token_id": [2, 0]})
    assert saved({"eos_token_id": 0}, {"eos_token_id": 2}) == ((2, 0), {"eos_token_id": [2, 0]})
    kept = {"eos_token_id": [0, 2], "top_p": 0.9}
    assert saved(kept, {}) == ((2, 0), kept)


def test_deepseeks_format_travels_where_chats_are_written_in_it(tmp_path):
    demo_tokenizer().save(tmp_path / "a")
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    ours = Tokenizer.from_folder(tmp_path / "a")
    assert ours.template is None
    ours.save(tmp_path / "b")
    again = Tokenizer.from_folder(tmp_path / "b")
    assert again.template is not None and again.template.source == DEEPSEEK_TEMPLATE
    assert encode_chat(again, CHAT) == encode_chat(ours, CHAT) == encode_chat(demo_tokenizer(), CHAT)


def test_ids_that_are_used_are_refused_and_not_those_that_exist(tmp_path):
    """The vocabulary ends with a PAD that the embedding has no row for."""
    backend = qwen()._special.from_str(qwen()._special.to_str())
    backend.add_special_tokens([PAD])
    rows = backend.get_vocab_size() - 1
    ours = Tokenizer(backend, bos=None, eos=QWEN[2], pad=PAD, template=ChatTemplate(CHATML, {}))
    few = ours.over(rows)
    assert (ours.pad_id, few.pad_id, few.usable, ours.over(rows + 1) is ours) == (rows, 2, rows, True)
    assert few.encode(f"the {PAD}") == ours.encode(f"the {PAD}")  # spelled by other tokens
    with pytest.raises(ValueError, match=f"token '{PAD}' has the id {rows}, and the model's vocab_size={rows}"):
        few.encode(PAD, allow_special=True)
    with pytest.raises(ValueError, match="token .* has the id"):
        few.token_id(PAD)
    with pytest.raises(ValueError, match="has the id 2, and the model's vocab_size=2: "):
        _ = ours.over(2).eos_id

    model = config(V3, num_hidden_layers=2, vocab_size=rows, max_position_embeddings=64)
    loaded = whole(model, *weights(model), ours)
    greedy = SamplingParams(temperature=0.0, max_tokens=4)
    prompts = ["the fox", "the quick brown fox"]  # the first is padded
    answers = [a.token_ids for a in Engine(loaded).generate(prompts, greedy)]
    assert answers == [Engine(loaded).generate([prompt], greedy)[0].token_ids for prompt in prompts]

    (tmp_path / "text.txt").write_text("the quick brown fox")
    text = PretrainData(path=(str(tmp_path / "text.txt"),), fim_rate=0.0, seq_len=16)
    prepare_rows(text, loaded.text, tmp_path / "rows", seed=0)
    with pytest.raises(ValueError, match="vocab_size=70"):
        prepare_rows(text, ours.over(70), tmp_path / "rows2", seed=0)
    chats = SFTData(path=(str(tmp_path / "chats.jsonl"),), seq_len=64)
    lines = [json.dumps({"prompt": said, "completion": "x"}) + "\n" for said in ("the fox", f"the {PAD}")]
    (tmp_path / "chats.jsonl").write_text(lines[0])
    prepare_chats(chats, loaded.text, tmp_path / "chats")
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match=f"chats.jsonl:2: token '{PAD}' has the id {rows}"):
        prepare_chats(chats, loaded.text, tmp_path / "chats2")
