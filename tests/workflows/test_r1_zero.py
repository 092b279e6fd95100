"""R1-Zero: a base model is asked by the paper's text, trained, and what comes of the run is asked so too."""

import dataclasses
import json
import shutil

import pytest
from data.test_chat_templates import PAPER
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax import save_hf
from deepseek_jax.checkpoint.model import load
from deepseek_jax.cli.main import main
from deepseek_jax.cli.talk import Answering
from deepseek_jax.data.chat import encode_prompt
from deepseek_jax.data.special_tokens import BOS
from deepseek_jax.rl import asking

LONG = dataclasses.replace(SPEAKER, max_position_embeddings=1024)  # which the paper's text needs in small tokens
OPTIONS = ["--init-from", "base", "--chat-template", "r1_zero", "--task.path", "train.jsonl", "--run-dir", "zero"]
OPTIONS += ["--reward", "tags", "--reward", "accuracy", "--loss.kl-weight", "0.001", "--step.microbatches", "1"]
OPTIONS += ["--rollout.prompts", "2", "--rollout.group", "4", "--rollout.max-tokens", "4", "--rollout.patience", "0"]
OPTIONS += ["--loop.checkpoint-every", "1", "--loop.log-every", "1", "--loop.no-tensorboard"]


@pytest.fixture
def base(tmp_path, monkeypatch) -> None:
    save_hf(whole(LONG, *weights(SPEAKER)).network(), tmp_path / "base", dtype="float32")
    tokenizer().save(tmp_path / "base")
    rows = [{"prompt": f"{n}+1?", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)


def test_a_base_is_trained_by_the_papers_text_and_keeps_it(base, monkeypatch):
    asked, encode = [], encode_prompt

    def noted(text, messages):
        asked.append(text.decode(encode(text, messages), skip_special_tokens=False))
        return encode(text, messages)

    monkeypatch.setattr(asking, "encode_prompt", noted)
    assert main(["grpo", *OPTIONS, "--loop.steps", "1"]) == 0
    texts = {BOS + PAPER.replace("prompt", f"{n}+1?") for n in range(4)}
    assert {*asked} == texts
    assert main(["grpo", *OPTIONS, "--loop.steps", "2"]) == 0
    assert {*asked} == texts
    engine = Answering("base", chat_template="r1_zero").engine()
    for speaker in (load("zero").text, load("base").asked_by("r1_zero").text, engine.tokenizer):
        prompt = encode(speaker, [{"role": "user", "content": "3+1?"}])
        assert speaker.decode(prompt, skip_special_tokens=False) in texts


def test_a_template_that_is_none_is_refused_before_the_model_is_read(base, capsys):
    shutil.rmtree("base")
    for command in (["grpo", *OPTIONS], ["generate", "base", "--prompt", "1"]):
        assert main([*command, "--chat-template", "r1-zero"]) == 1
        assert "chat_template='r1-zero': expected r1_zero or a file of jinja2 text" in capsys.readouterr().err
