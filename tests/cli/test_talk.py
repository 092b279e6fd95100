"""``generate`` and ``chat`` on a released model's folder."""

import json
import sys
import types

import jax.numpy as jnp
import pytest
from model.tiny import weights
from small import SPEAKER, tokenizer

from deepseek_jax.cli import talk
from deepseek_jax.cli.main import main
from deepseek_jax.data.tokenizer import BOS, EOS
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.model import transformer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}[answer]<think>\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that looks like a released model; what its weights give is not what is tested here."""

    def load_hf(path, *, mesh=None, dtype=jnp.bfloat16):
        assert str(path) == str(tmp_path) and mesh is None and dtype == jnp.float32
        return transformer.merge(SPEAKER, *weights(SPEAKER))

    stub = types.ModuleType("hf_load")
    stub.__dict__["load_hf"] = load_hf
    monkeypatch.setitem(sys.modules, "deepseek_jax.checkpoint.hf_load", stub)
    tokenizer().save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    config = {"bos_token": BOS, "eos_token": EOS, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def answer(prompt: str | list[int], **more) -> str:
    engine = Engine(transformer.merge(SPEAKER, *weights(SPEAKER)), tokenizer())
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


def test_chat_shows_thinking_that_the_prompt_opened(folder, monkeypatch):
    """Dimmed, also where the answer was cut before it ended; the next prompt goes through the template again."""
    questions, shown, prompts = iter(["1", "2", ""]), [], []
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt="": next(questions))
    monkeypatch.setattr("rich.console.Console.print", lambda self, text, **given: shown.append(text))
    completions = iter(["easy\n</think>\n\nOne.", "cut in the mid"])

    def generate(self, asked, sampling):
        prompts.append(self.decode(asked[0]))
        return [types.SimpleNamespace(text=next(completions))]

    monkeypatch.setattr(Engine, "generate", generate)
    assert main(["chat", str(folder), "--max-tokens", "6"]) == 0
    assert str(folder) in shown[0]
    assert [(str(text), str(text.style)) for text in shown[1:]] == [
        ("easy", "dim"), ("One.", ""), ("cut in the mid", "dim"), ("", "")
    ]  # fmt: skip
    assert prompts[0] == f"{BOS}[user]1[answer]<think>\n"
    assert prompts[1] == f"{BOS}[user]1[assistant]\n\nOne.[user]2[answer]<think>\n"


def test_what_is_a_released_model(folder):
    assert talk.is_hf_folder(folder)
    (folder / "model.safetensors").unlink()
    assert not talk.is_hf_folder(folder)
