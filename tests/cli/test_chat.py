"""``chat``: what is asked, shown and saved; Ctrl-C, and what cannot be asked."""

import builtins
import json
import os
import signal

import pytest
from cli.test_talk import folder as folder
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.cli.main import main
from deepseek_jax.cli.thinking import Thinking
from deepseek_jax.data.chat import split_thinking
from deepseek_jax.data.special_tokens import BOS
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.turns import taught
from deepseek_jax.inference.answers import Completion
from deepseek_jax.inference.engine import Engine


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """Runs a chat of these lines with these answers, each a list of pieces -> (the prompts, what was printed)."""

    def run(lines: list[str], answers: list[list[str]], *options: str, status: int = 0) -> tuple[list[str], str]:
        typed, given, prompts = iter(lines), iter(answers), []

        def read(prompt: str = "") -> str:
            line = next(typed, None)
            if line is None:
                raise EOFError
            if line == "^C":
                os.kill(os.getpid(), signal.SIGINT)
            return line or ""

        def stream(self, asked, sampling):
            prompts.append(self.decode(asked))
            for piece in next(given):
                if piece == "^C":
                    os.kill(os.getpid(), signal.SIGINT)
                    piece = ""
                yield Completion(piece, [], [], "")

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr(Engine, "stream", stream)
        assert main(["chat", str(folder), "--max-tokens", "6", *options]) == status
        return prompts, capsys.readouterr().out

    return run


def test_thinking_that_the_prompt_opened_is_told_apart(talk, folder):
    """Also where the answer was cut before it ended; the next prompt goes through the template again."""
    prompts, printed = talk(["1", "2"], [["easy\n</th", "ink>\n\nOne", "."], ["cut in", " the mid"]])
    assert printed.splitlines()[0].startswith(f"{folder} · an empty line ends the talk")
    assert printed.splitlines()[1:] == ["easy", "One.", "cut in the mid"]
    assert prompts[0] == f"{BOS}[user]1[answer]<think>\n"
    assert prompts[1] == f"{BOS}[user]1[assistant]\n\nOne.[user]2[answer]<think>\n"


def test_a_model_that_was_taught_single_turns_is_asked_single_turns(talk, folder):
    """Unless it is said otherwise; one of which nothing is known is asked all together."""
    alone = [f"{BOS}[user]{text}[answer]<think>\n" for text in "12"]
    assert talk(["1", "2"], [["A"], ["B"]], "--turns", "single")[0] == alone
    assert talk(["1", "2"], [["A"], ["B"]])[0] != alone
    taught(Tokenizer.from_folder(folder), [1], released=False).save(folder)
    prompts, printed = talk(["1", "2"], [["A"], ["B"]])
    assert prompts == alone and "each question is asked by itself (--turns many: all together)" in printed
    assert talk(["1", "2"], [["A"], ["B"]], "--turns", "many")[0] != alone


def test_lines_with_a_slash(talk, tmp_path):
    file = tmp_path / "talk.jsonl"
    lines = ["1", f"/save {file}", "/new", "2", "/system Be brief.", "3", f"/save {file}", "/help", "/nothing", "/save"]
    prompts, printed = talk([*lines, f"/save {tmp_path}"], [["A"], ["B"], ["C"]])
    assert [prompt.count("[user]") for prompt in prompts] == [1, 1, 1]
    assert prompts[2].startswith(f"{BOS}[system]Be brief.[user]3")
    user = [{"role": "user", "content": text} for text in "13"]
    said = [{"role": "assistant", "content": f"<think>{text}"} for text in "AC"]
    assert [json.loads(line)["messages"] for line in file.read_text().splitlines()] == [
        [user[0], said[0]],
        [{"role": "system", "content": "Be brief."}, user[1], said[1]],
    ]
    assert "a new talk, opened by: Be brief." in printed and "/system TEXT" in printed
    assert "/nothing: not known" in printed and "Is a directory" in printed


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_talk(talk):
    prompts, printed = talk(["1", "2", "^C"], [["ab", "^C", "never"], ["cd"]], status=130)
    assert "ab\n(stopped)\ncd\n" in printed
    assert "[user]1[assistant]<think>ab[user]2" in prompts[1]


def test_what_cannot_be_asked_is_said_and_the_talk_goes_on(talk, folder):
    """A line that is too long for the model; a talk that has become so; what the template refuses."""
    prompts, printed = talk(["1" * 12_000, "2", "3" * 40, "4"], [["A"], ["B"], ["C"]])
    assert "tokens: beside an answer of --max-tokens 6 this model takes 58" in printed
    assert "the talk is too long for this model; starting anew" in printed and len(prompts) == 3
    config = folder / "tokenizer_config.json"
    template = {"chat_template": "{% if messages[0].content == 'no' %}{{ raise_exception('not that') }}{% endif %}x"}
    config.write_text(json.dumps(json.loads(config.read_text()) | template))
    prompts, printed = talk(["no", "yes"], [["A"]])
    assert "chat template: not that" in printed and printed.endswith("A\n") and prompts == ["x"]


def test_no_escape_reaches_the_terminal(talk):
    assert talk(["1"], [["</think>a\x1b[31mb\x07"]])[1].endswith("\na[31mb\n")


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " b", "\n", "<", "</th", "ink>"]), max_size=8), st.data())
def test_thinking_is_told_apart_as_in_a_whole_text(words, data):
    """Wherever the pieces are cut, what is shown is the same; and it is what split_thinking finds in an answer with
    one thinking."""
    text = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def shown(pieces: list[str]) -> list[str]:
        stream, kinds = Thinking(), {True: "", False: ""}
        for thinking, part in [part for piece in pieces for part in stream.push(piece)] + stream.finish():
            kinds[thinking] += part
        return [kinds[True], kinds[False]]

    assert shown(pieces) == shown([text])
    if text.startswith("<think>") and text.count("<think>") == 1 and text.count("</think>") <= 1:
        assert [part.strip() for part in shown(pieces)] == [*split_thinking(text)]
