"""The command line: what it prints, and one line and a status for each mistake."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from deepseek_jax.cli.main import COMMANDS, main
from deepseek_jax.workflows import demo

DATA = ["--data.path", "run/corpus/documents/train.jsonl", "--data.heldout", "run/corpus/documents/heldout.jsonl"]
DATA += ["--data.tokenizer", "run/corpus/tokenizer.json"]
PRETRAIN = ["pretrain", "recipes/pretrain.py", "--run-dir", "run/pretrain", *DATA]
# A mesh of the eight devices here that splits a microbatch of two rows.
ON_EIGHT = ["--mesh.data", "2", "--mesh.tensor", "2", "--mesh.context", "2"]


@pytest.fixture
def workplace(miniature, tmp_path, monkeypatch):
    """A copy of the miniature demo, to stand in and to spoil."""
    shutil.copytree(miniature, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail: one line that names it, the hint, and what the line says."""

    def run(*arguments: str, status: int = 1) -> str:
        assert main(list(arguments)) == status
        printed = capsys.readouterr()
        message, hint = printed.err.strip().splitlines()[-2:]
        assert message.startswith(f"deepseek-jax {arguments[0]}: ") and "DEEPSEEK_JAX_TRACEBACK=1" in hint
        return message

    return run


def parse_error(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    return re.sub(r"[\s│]+", " ", printed.err + printed.out)


# What needs no run


def test_usage_names_every_command(capsys):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {command} " in usage for command in COMMANDS)
    assert main([]) == 2


def test_an_unknown_command_is_refused(capsys):
    assert main(["pretrian"]) == 2
    assert "no command 'pretrian'; did you mean pretrain? there are demo, corpus, pretrain" in capsys.readouterr().err
    assert main(["zzz"]) == 2
    assert "no command 'zzz'; there are demo" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: deepseek-jax {command}" in capsys.readouterr().out


def test_an_unknown_field_is_refused_with_a_likely_one(capsys):
    message = parse_error(capsys, "pretrain", "--loop.stepz", "3")
    assert "--loop.stepz" in message and "--loop.steps" in message


@pytest.mark.parametrize(
    "option, value, right", [("--loop.steps", "many", "INT"), ("--loss.normalise", "mean", "dr_grpo")]
)
def test_a_wrong_type_is_refused(option, value, right, capsys):
    message = parse_error(capsys, "grpo", option, value)
    assert option in message and value in message and right in message, message


@pytest.mark.parametrize(
    "command, option, value, advice",
    [
        ("pretrain", "--model.attention", "mha", "mha is gqa with num_key_value_heads = num_attention_heads"),
        ("sft", "--compute.dtype", "bf16", "bf16 is bfloat16"),
        ("grpo", "--compute.param-dtype", "float16", "'float16' is none of float32, bfloat16, float8_e4m3"),
    ],
)
def test_a_word_of_others_is_answered_with_what_it_is_here(command, option, value, advice, capsys):
    message = parse_error(capsys, command, option, value)
    assert option in message and advice in message


@pytest.mark.parametrize(
    "options, names",
    [
        (["--model.n-group", "3"], ["n_group=3", "n_routed_experts=16"]),
        (["--model.num-experts-per-tok", "9"], ["num_experts_per_tok=9", "leaves only 8"]),
        (["--mesh.fsdp", "0"], ["fsdp=0", "at least 1"]),
        (["--step.microbatches", "0"], ["microbatches=0"]),
        (["--step.microbatches", "3"], ["step.microbatches=3", "8 rows of batch_size=8"]),
    ],
)
def test_a_combination_that_makes_no_sense_is_refused(options, names, capsys):
    message = parse_error(capsys, "pretrain", *options)
    assert all(name in message for name in names)


def test_a_recipe_of_another_command_is_refused(refused):
    assert "sft.py gives a SFTConfig; this command takes a PretrainConfig" in refused("pretrain", "demo/sft")
    assert "no recipe 'demo/nothing'" in refused("grpo", "demo/nothing")


@pytest.mark.parametrize(
    "arguments, missing",
    [
        (["pretrain"], "data.path is empty: give --data.path"),
        (["pretrain", "--data.path", "x"], "data.tokenizer is empty: give --data.tokenizer"),
        (["sft"], "init_from is empty: give --init-from"),
        (["sft", "--init-from", "x"], "data.path is empty"),
        (["grpo"], "init_from is empty"),
        (["grpo", "--init-from", "x"], "task.path is empty: give --task.path"),
    ],
)
def test_a_stage_says_what_it_lacks(arguments, missing, refused, tmp_path, monkeypatch):
    """Without a recipe it has its own defaults, and nothing of the demo is in them."""
    monkeypatch.chdir(tmp_path)
    assert missing in refused(*arguments)
    assert not list(tmp_path.iterdir())


def test_interrupting_is_no_error(monkeypatch, capsys):
    def stop(config):
        raise KeyboardInterrupt("SIGINT: stopped after step 7")

    monkeypatch.setattr(demo, "demo", stop)
    assert main(["demo"]) == 130
    assert "stopped after step 7" in capsys.readouterr().err


def test_the_traceback_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no recipe 'demo/nothing'"):
        main(["grpo", "demo/nothing"])


def test_inspect_tells_what_a_model_costs(capsys):
    assert main(["inspect", "demo/pretrain"]) == 0
    printed = capsys.readouterr().out
    assert "cache per token" in printed and "arithmetic per token" in printed


# On a run


def test_generate_prints_completions(workplace, capsys):
    command = ["generate", "run", "--prompt", "12+34=", "--prompt", "def", "--max-tokens", "4"]
    printed = []
    assert main([*command]) == 0 and "run: run/grpo, step " in capsys.readouterr().err, "which of the demo's answers"
    for more in ([], [], ["--temperature", "5.0", "--seed", "1"], ["--chat"]):
        assert main([*command, *more]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert printed[0].startswith("12+34=") and "\ndef" in printed[0]
    assert not printed[3].startswith("12+34=")


def test_chat_answers_until_an_empty_line(workplace, monkeypatch, capsys):
    """The demo's chats have single turns, which its stages have written down."""
    questions = iter(["12+34=", "1+" * 50, ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(questions))
    assert main(["chat", "run", "--max-tokens", "8"]) == 0
    printed = capsys.readouterr().out
    assert "run/grpo · each question is asked by itself" in printed
    assert next(questions, None) is None


def test_report_is_written_again(workplace, capsys):
    (workplace / "run" / "report.html").unlink()
    assert main(["report", "run"]) == 0
    assert (workplace / "run" / "report.html").is_file()
    assert "bits per byte" in capsys.readouterr().out


def test_stages_are_compared_and_reported_on_by_themselves(workplace, capsys):
    assert main(["compare", "run/pretrain", "run/sft", "--output", "out/sides.html"]) == 0
    assert "finished" in capsys.readouterr().out
    page = (workplace / "out" / "sides.html").read_text(encoding="utf-8")
    assert "parameters active per token" in page and "optimizer.constant_until" in page
    assert main(["report", "run/sft"]) == 0
    assert "held-out loss" in capsys.readouterr().out and (workplace / "run" / "sft" / "report.html").is_file()


def test_inspect_reads_a_run(workplace, capsys):
    shutil.rmtree(workplace / "run" / "sft" / "checkpoints")  # its config.json says it too
    for path, stage in (("run", "grpo"), ("run/sft", "sft"), ("run/pretrain/config.json", "pretrain")):
        assert main(["inspect", path]) == 0
        printed = capsys.readouterr().out
        assert f"{path}, a run of {stage}" in printed and "1 dense, 1 MoE, 1 MTP" in printed


def test_without_a_run_it_says_where_it_looked(refused, tmp_path):
    for command in ("generate", "chat", "inspect"):
        message = refused(command, str(tmp_path), *(["--prompt", "x"] * (command == "generate")))
        assert str(tmp_path) in message
    assert "--prompt" in refused("generate", str(tmp_path))


def test_a_broken_line_of_data_is_named(workplace, refused):
    path = workplace / "run" / "corpus" / "documents" / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[4] = '{"text": "cut'
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.rmtree(workplace / "run" / "pretrain")
    assert "documents/train.jsonl:5: " in refused(*PRETRAIN, *ON_EIGHT)
    assert not (workplace / "run" / "pretrain" / "rows").exists()


def test_a_file_that_is_missing_is_named(workplace, refused):
    def said(rows: str, asked: str, init_from: str) -> str:
        paths = ["--task.path", f"run/corpus/{rows}", "--evaluation.task.path", f"run/corpus/{asked}"]
        return refused("grpo", "recipes/grpo.py", "--run-dir", "run/new", "--init-from", init_from, *paths)

    there = "problems_train.jsonl"
    assert "run/corpus/none.jsonl" in said("none.jsonl", there, "run/sft")
    assert "run/corpus/none.jsonl" in said(there, "none.jsonl", "run/sft")
    assert "run/nothing" in said(there, there, "run/nothing")


def test_a_mesh_that_does_not_fit_is_refused(workplace, refused):
    message = refused(*PRETRAIN, "--mesh.data", "3")
    assert "data 3" in message and "needs 3 devices, but there are 8" in message
    # Eight devices split each microbatch eight ways: two rows do not do.
    said = "data=8 does not divide the 2 rows of batch_size=4, step.microbatches=2; the nearest is 8 rows"
    assert said in refused(*PRETRAIN, "--run-dir", "run/new")


def test_the_checkpoint_of_another_model_is_refused(workplace, refused):
    message = refused(*PRETRAIN, *ON_EIGHT, "--model.hidden-size", "32", "--loop.steps", "30")
    assert "model.hidden_size is 16 there and 32 here" in message
    checkpoints = workplace / "run" / "pretrain" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir() if path.name.isdecimal()] == ["24"]


def test_a_run_where_another_process_trains_is_left_alone(workplace, refused):
    before = {path: path.read_bytes() for path in (workplace / "run" / "pretrain").rglob("*") if path.is_file()}
    program = "import sys, time; from deepseek_jax.train.run_lock import run_lock\n"
    program += "with run_lock('run/pretrain'): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert f"run/pretrain: process {other.pid} on " in refused(*PRETRAIN)
        other.kill()
    (workplace / "run" / "pretrain" / "lock.json").unlink()
    assert before == {path: path.read_bytes() for path in (workplace / "run" / "pretrain").rglob("*") if path.is_file()}


def test_a_finished_run_is_not_measured_anew_nor_another_one_in_its_place(workplace, refused, capsys):
    result = workplace / "run" / "pretrain" / "result.json"
    before = json.loads(result.read_text())
    message = refused(*PRETRAIN, *ON_EIGHT, "--optimizer.peak-lr", "1")
    assert "run/pretrain holds a run with other settings: optimizer.peak_lr is 0.01 there and 1.0 here" in message
    assert json.loads(result.read_text()) == before
    assert main([*PRETRAIN, *ON_EIGHT, "--loop.log-every", "5"]) == 0
    assert "run/pretrain: step 24 was reached before; nothing was trained" in capsys.readouterr().err
    again = json.loads(result.read_text())
    assert again.pop("heldout").keys() == before.pop("heldout").keys()  # trees, whose sums are below
    assert again == pytest.approx(before | {"steps_here": 0}, rel=1e-5)
    config = json.loads((workplace / "run" / "pretrain" / "config.json").read_text())
    assert config["history"][0]["changed"]["loop.log_every"] == [1, 5]


def test_rows_packed_otherwise_are_refused(workplace, refused):
    message = refused(*PRETRAIN, *ON_EIGHT, "--data.seq-len", "64")
    assert (
        "run/pretrain/rows was packed from other data or settings: data.seq_len is 32 there and 64 here" in message
        and "choose another run_dir" in message
    )


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(workplace, refused):
    message = refused(*PRETRAIN, *ON_EIGHT, "--model.vocab-size", "200")
    assert re.search(r"vocab_size is \d+ there and 200 here", message)
    message = refused(*PRETRAIN, *ON_EIGHT, "--run-dir", "run/few", "--model.vocab-size", "200")
    assert re.search(r"token .* has the id 2\d\d, and the model's vocab_size=200", message)


def test_prompts_that_do_not_fit_are_refused(workplace, refused):
    rows = "run/corpus/problems_train.jsonl"
    arguments = ["--init-from", "run/sft", "--task.path", rows, "--evaluation.task.path", rows, "--run-dir", "run/new"]
    message = refused("grpo", "recipes/grpo.py", *arguments, "--rollout.max-prompt", "5")
    assert "problems_train.jsonl:1: a prompt of 9 tokens" in message and "rollout.max_prompt=5" in message


def test_the_program_gives_its_status_to_the_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deepseek-jax", "nothing"])
    assert main() == 2
