"""The page of runs in one folder, as `r1` leaves it: their order, what each began with, before and after."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deepseek_jax.workflows.report import print_summary, write_report
from deepseek_jax.workflows.report_data import read_stages, start_of

ODD = "<img src=x onerror=alert(1)>"


def write(folder: Path, stage: str = "", *, began: str = "", time: float = 0.0, **result: Any) -> Path:
    """A run that began with the one beside it of this name, as it was when all of them lay elsewhere."""
    folder.mkdir(parents=True)
    recipe = {"run_dir": f"runs/r1/{folder.name}", "init_from": f"runs/r1/{began}" if began else ""}
    (folder / "config.json").write_text(json.dumps({"stage": stage, "recipe": recipe}))
    if time:
        loss = {"reward": 0.5, "response_length": 7.0} if stage == "grpo" else {"ce": 2.0}
        lines = [{"step": step, "time": time} | loss for step in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def figures(share: float) -> dict:
    return {"questions": 50, "pass@1": share, "stderr": 0.05, "cons@2": 0.5, "cut_off": 0.25, "tokens": 1234.0}


@pytest.fixture
def r1(tmp_path: Path) -> Path:
    folder = tmp_path / "moved" / ODD
    write(folder / "zero", "grpo", began="base", time=30, accuracy_sampled=0.5, accuracy_sampled_stderr=0.01)
    write(folder / "base", "pretrain", time=20, bits_per_byte=2.0)
    write(folder / ODD, "sft", began="base", time=25, accuracy_sampled=0.2, accuracy_sampled_stderr=0.01)
    write(folder / "reasoning", "grpo", began=ODD, time=40, accuracy_sampled=0.75, accuracy_sampled_stderr=0.02)
    write(folder / "samples", "rejection", began="reasoning", time=45, answers=400, questions=100, kept=100)
    counts = {"answers": 400, "questions": 100, "kept": 100, "dropped": {"wrong": 280, "cut_off": 20}}
    (folder / "samples" / "result.json").write_text(json.dumps(counts))
    agreement = {"agreement": 0.8125, "agreement_stderr": 0.02, "agreement_of": 381}
    write(folder / "helpful", "reward_model", began=ODD, time=50, **agreement)
    result: dict[str, Any] = {
        "zero": {"maths": figures(0.6)},
        ODD: {"maths": figures(0.3)},
        "reasoning": {"maths": figures(0.8)},
    }
    write(folder / "evaluation", "evaluation", time=60, **result)
    return folder


def row(text: str, title: str) -> list[str]:
    cells = re.search(rf"<tr><th>{re.escape(title)}</th>(.*?)</tr>", text)
    assert cells
    return [cell.replace("&nbsp;", " ") for cell in re.findall(r"<td>(.*?)</td>", cells[1])]


def test_runs_stand_in_the_order_of_their_time_or_of_the_recipe_or_of_a_list(r1):
    named = [stage.folder.name for stage in read_stages(r1)]
    assert named == ["base", ODD, "zero", "reasoning", "samples", "helpful", "evaluation"]
    recipe = ["data", "pretrain", "zero", "sft", "student"]
    for name in reversed(recipe):
        write(r1.parent / "plain" / name, "stage")
    assert [stage.folder.name for stage in read_stages(r1.parent / "plain")] == recipe
    order = ["base", "zero", "reasoning", "student"]
    (r1 / "r1.json").write_text(json.dumps({"stages": order}))
    stages = read_stages(r1)
    assert [stage.folder.name for stage in stages][:4] == order and len(stages) == 8, "what is not listed comes last"
    assert (stages[3].title, stages[3].status) == ("Student", "not started")
    assert "Student is not started" in write_report(r1).read_text(encoding="utf-8")


def test_each_begins_with_the_run_beside_it_wherever_they_lie_now(r1):
    stages = {stage.folder.name: stage for stage in read_stages(r1)}
    starts = {name: start_of(stage, [*stages.values()]) for name, stage in stages.items()}
    began = {name: start and start.folder.name for name, start in starts.items()}
    assert began == {
        "base": None,
        ODD: "base",
        "zero": "base",
        "reasoning": ODD,
        "samples": "reasoning",
        "helpful": ODD,
        "evaluation": None,
    }


def test_before_and_after_each_stage(r1):
    text = write_report(r1).read_text(encoding="utf-8")
    heads = re.findall(r"<th>(.*?)</th>", text[text.index("<h3>Stages</h3>") : text.index("</thead>")])
    assert heads[:4] == ["", "begins with", "sampled accuracy", "maths, pass@1"], "all are finished: no status"
    assert row(text, "Reasoning RL")[1:3] == ["20.0 → 75.0 ± 2.0%", "30.0 → 80.0 ± 5.0%"]
    assert row(text, "R1-Zero")[:3] == ["base", "50.0 ± 1.0%", "60.0 ± 5.0%"]
    assert "kept 100 of 400" in row(text, "Samples") and "agreement 81.2 ± 2.0%" in row(text, "Helpfulness")
    card = re.search(r"<h3>Before and after: sampled accuracy</h3>(.*?)</figure>", text, re.S)
    assert card
    dots = re.findall(r'<g style="--c:var\(--(\w+)\)">.*?cx="([\d.]+)" cy="([\d.]+)"', card[1])
    ticks = dict(re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="middle">(\d+)<', card[1]))
    place = {value: float(x) for x, value in ticks.items()}
    assert [colour for colour, *_ in dots] == ["green", "green", "slate", "green"]
    assert float(dots[2][1]) == pytest.approx(place["20"], abs=0.1) and dots[2][2] == dots[3][2]
    assert float(dots[1][1]) == pytest.approx((place["40"] + place["60"]) / 2, abs=0.1)


def test_figures_of_what_was_asked_and_kept(r1):
    text = write_report(r1).read_text(encoding="utf-8")
    assert row(text, "reasoning, maths") == ["50", "80.0 ± 5.0%", "50.0%", "25.0%", "1,234"]
    card = text[text.index("<h3>Kept and dropped</h3>") :]
    assert row(card, "kept") == ["100", "25.0%"] and row(text, "dropped: cut off") == ["20", "5.0%"]
    assert "Of 400 answers to 100 questions" in text
    line = {"prompt": "p", "completion": "said", "answer": "a", "tokens": 3, "ended": True, "correct": True}
    (r1 / "evaluation" / "zero").mkdir()
    (r1 / "evaluation" / "zero" / "maths-1.jsonl").write_text(json.dumps(line) + "\n")
    text = write_report(r1).read_text(encoding="utf-8")
    assert "Evaluation, zero/maths-1" in text and "<div>right 1</div>" in text


def test_names_of_folders_are_text_and_no_id_comes_twice(r1):
    text = write_report(r1).read_text(encoding="utf-8")
    assert "<img" not in text and text.count("&lt;img") > 5
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids)) and {"headline", "zero-reward", "base-losses"} <= set(ids)
    console = Console(file=io.StringIO(), width=200)
    print_summary(r1, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "20.0 → 75.0 ± 2.0%" in printed and "agreement 81.2" in printed


def test_a_reward_model_s_own_folder(tmp_path):
    folder = write(tmp_path / "x", "reward_model", agreement=0.75, agreement_stderr=0.03, agreement_of=200)
    line = {"step": 1, "loss": 0.7, "margin": 0.1, "eval/agreement": 0.75, "eval/agreement_stderr": 0.03}
    (folder / "metrics.jsonl").write_text(json.dumps(line | {"eval/agreement_of": 200.0}) + "\n")
    text = write_report(folder).read_text(encoding="utf-8")
    assert '<p class="lead">Agreement 75.0 ± 3.0%.</p>' in text and row(text, "agreement") == ["0.75 ± 0.03"]
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles == ["Summary", "Loss, Reward model", "Agreement, Reward model", "margin, Reward model"]


def test_an_evaluation_s_own_folder(tmp_path):
    (tmp_path / "settings.json").write_text('{"model": "0123-4567"}')
    (tmp_path / "result.json").write_text(json.dumps({"gsm8k=x.jsonl": figures(0.125)}))
    curve = {"task": "<gsm8k>", "x": [1, 2, 8], "accuracy": [0.25, 0.5, 1.0], "stderr": [0.0, 0.1, None]}
    curves = [curve | {"kind": kind} for kind in ("budget", "majority", "best_of")]
    curves.append(curves[0] | {"label": "Wait, 2 times at most"})
    (tmp_path / "scaling.json").write_text(json.dumps({"curves": curves}))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "0123-4567" in text and "not written yet" not in text
    assert row(text, "gsm8k=x.jsonl")[1] == "12.5 ± 5.0%"
    card = re.search(r"<h3>Several answers, &lt;gsm8k&gt;</h3>(.*?)</figure>", text, re.S)
    assert card and "majority vote" in card[1] and "best of n" in card[1]
    assert "budget, Wait, 2 times at most" in text
    x = [float(place) for place in re.findall(r'class="dot" cx="([\d.]+)"', card[1])][:3]
    assert (x[1] - x[0]) * 2 == pytest.approx(x[2] - x[1], abs=0.2), "1, 2 and 8 on a logarithmic axis"
    assert re.findall(r">(1|2|8)</text>", card[1]) == ["1", "2", "8"]
    (tmp_path / "scaling.json").write_text(json.dumps({"curves": [curves[0] | {"x": [1]}]}))
    with pytest.raises(ValueError, match=r"scaling\.json: x, accuracy and stderr of <gsm8k> are not of one length"):
        write_report(tmp_path)
