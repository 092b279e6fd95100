"""``generate`` and ``chat`` on a released model's folder."""

import builtins
import json

import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax import ComputeConfig, save_hf
from deepseek_jax.cli import talk
from deepseek_jax.cli.main import main
from deepseek_jax.data.special_tokens import BOS, EOS
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}[answer]<think>\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    """A released model whose chat template is its own."""
    save_hf(whole(SPEAKER, *weights(SPEAKER), tokenizer()), tmp_path, dtype="float32")
    (tmp_path / "generation_config.json").unlink()
    config = {"bos_token": BOS, "eos_token": EOS, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def answer(prompt: str | list[int], **more) -> str:
    engine = Engine(whole(SPEAKER, *weights(SPEAKER), tokenizer()))
    return engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=6, **more))[0].text


def test_generate_completes_text_and_asks_in_the_folders_template(folder, capsys):
    command = ["generate", str(folder), "--max-tokens", "6"]
    assert main([*command, "--prompt", "def"]) == 0
    assert capsys.readouterr().out == "def" + answer("def") + "\n"
    asked = tokenizer().encode(f"{BOS}[user]12[answer]<think>\n", allow_special=True)
    assert main([*command, "--chat", "--prompt", "12"]) == 0
    assert capsys.readouterr().out == "<think>" + answer(asked) + "\n"


def test_a_released_model_has_no_steps_and_no_mean(folder, capsys):
    for option in (["--ema"], ["--step", "3"]):
        assert main(["generate", str(folder), *option, "--prompt", "def"]) == 1
        assert "is a released model: it has no other steps and no running mean" in capsys.readouterr().err


def test_without_a_template_deepseeks_is_used(folder, capsys):
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    assert main(["generate", str(folder), "--max-tokens", "6", "--chat", "--prompt", "12"]) == 0
    ours = tokenizer()
    assert capsys.readouterr().out == answer([0, ours.user_id, *ours.encode("12"), ours.assistant_id]) + "\n"


def test_the_generation_configs_tokens_end_answers(folder, capsys):
    stop = tokenizer().encode(answer("def"))[2]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    assert main(["generate", str(folder), "--max-tokens", "6", "--prompt", "def"]) == 0
    assert capsys.readouterr().out == "def" + answer("def", stop_token_ids=(stop,)) + "\n"


def test_bytes_that_are_no_text_are_shown_as_such(folder, capsys):
    assert main(["generate", str(folder), "--max-tokens", "6", "--prompt", "caf\udce9"]) == 0
    assert capsys.readouterr().out == "caf\ufffd" + answer("caf\ufffd") + "\n"


def test_a_field_of_its_config_can_be_passed_over(folder, capsys):
    """By every command that reads a released model."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_magic": 3}))
    commands = {"generate": ["--prompt", "a", "--max-tokens", "2"], "inspect": [], "convert": [str(folder / "out")]}
    for command, more in commands.items():
        assert main([command, str(folder), *more]) == 1
        assert "attn_magic" in capsys.readouterr().err
        assert main([command, str(folder), *more, "--ignore-config", "attn_magic"]) == 0


def test_how_it_is_computed_can_be_said(folder, monkeypatch, capsys):
    """float32 on a CPU unless something else is asked for."""
    seen = []
    load = talk.load
    monkeypatch.setattr(talk, "load", lambda path, *, compute, **more: seen.append(compute) or load(path, **more))
    given = ["--compute.dtype", "bfloat16", "--compute.param-dtype", "bfloat16"]
    for more in ([], given):
        assert main(["generate", str(folder), "--max-tokens", "2", "--prompt", "def", *more]) == 0
    assert seen == [ComputeConfig(), ComputeConfig(dtype="bfloat16", param_dtype="bfloat16")]


def test_on_a_mesh_the_answers_are_those_of_one_device(folder, monkeypatch, capsys):
    """Experts apart, some in several places, heads split, prompts data-parallel: whole and streamed."""
    generate = ["generate", str(folder), "--max-tokens", "6", "--prompt", "def", "--prompt", "12", "--prompt", "7*"]
    rows = [[*range(8), *range(4)], [*range(8), 7, 7, 0, 1]]
    (folder / "placement.json").write_text(json.dumps({"physical_to_logical_map": rows}))
    chat = ["chat", str(folder), "--max-tokens", "6"]
    placed = ["--placement", str(folder / "placement.json")]
    meshes = [], ["--mesh.data", "0", "--mesh.expert", "2", "--mesh.tensor", "2", *placed]
    said, sizes, made = [], [], talk.make_mesh
    monkeypatch.setattr(talk, "make_mesh", lambda *given: sizes.append((mesh := made(*given)).size) or mesh)
    for mesh in meshes:
        for command in (generate, chat):
            typed = iter(["12", ""])
            monkeypatch.setattr(builtins, "input", lambda *_, typed=typed: next(typed))
            assert main([*command, *mesh]) == 0
            said.append(capsys.readouterr().out)
    assert sizes == [1, 1, 8, 8]
    assert said[:2] == said[2:]
    assert main([*generate, "--placement", str(folder / "config.json")]) == 1
    assert "has no physical_to_logical_map" in capsys.readouterr().err


def test_a_mesh_that_cannot_be_is_refused(folder, capsys):
    given = {"--mesh.expert=3": "expert=3 does not divide n_routed_experts=8", "--mesh.tensor=16": "but there are 8"}
    for option, said in given.items():
        for command in (["generate", str(folder), "--prompt", "a"], ["chat", str(folder)]):
            assert main([*command, option]) == 1
            assert said in capsys.readouterr().err
