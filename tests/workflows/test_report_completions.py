"""The table of completions and the charts of answers: what is shown of many, and that nothing in them is run."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deepseek_jax.workflows.report import write_report
from deepseek_jax.workflows.report_completions import CHARACTERS, SCRIPT
from deepseek_jax.workflows.report_rollouts import LONGEST, read_rollouts

HOSTILE = "</pre></td></tr></table><script>alert(1)</script><img src=x onerror=alert(2)> & \"'<!--"


class Table(HTMLParser):
    """The rows of the table of completions: what their data-* say, and their cells by heading."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[tuple[dict[str, str | None], dict[str, str]]] = []
        self.label = ""
        self.tags: list[str] = []
        self.feed(text[text.index('id="completions"') : text.index('id="configuration"')])

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append(({name: value for name, value in attrs if name.startswith("data-")}, {}))
        elif tag == "td":
            self.label = dict(attrs)["data-label"] or ""
            self.rows[-1][1][self.label] = ""

    def handle_endtag(self, tag):
        self.label = "" if tag == "td" else self.label

    def handle_data(self, data):
        if self.label:
            self.rows[-1][1][self.label] += data


def answer(step: int, question: int, **changed) -> dict:
    return {
        "step": step,
        "question": question,
        "prompt": f"What is {question}?",
        "answer": str(question),
        "completion": "<think>hm</think>no",
        "tokens": 4,
        "ended": True,
        "rewards": {"accuracy": 0.0, "language": None},
        "reward": 0.25,
        "advantage": -0.5,
    } | changed


def run(folder: Path, lines: list[dict], **metrics) -> Path:
    """A GRPO run that wrote these answers down, with two lines of metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"stage": "grpo"}))
    logged = [{"step": s, "time": 0.0, "reward": 0.1, "response_length": 10.0 * s} | metrics for s in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_row_holds_what_was_written_down(tmp_path):
    lines = [answer(1, 7), answer(1, 8, completion=HOSTILE, prompt=HOSTILE, answer=None, ended=False, advantage=None)]
    text = write_report(run(tmp_path, lines)).read_text(encoding="utf-8")
    (_, _), (first, cells), (second, others) = Table(text).rows
    assert first == {"data-index": "0", "data-tokens": "4", "data-reward": "0.25", "data-advantage": "-0.5"}
    assert cells == {
        "when": "GRPO, step 1",
        "prompt": "What is 7?",
        "completion": "<think>hm</think>no",
        "right answer": "7",
        "reward": "0.25accuracy 0language –",
        "advantage": "−0.5",
        "tokens": "4",
    }
    assert (others["prompt"], others["completion"]) == (HOSTILE, f"{HOSTILE} cut off")
    assert others["right answer"] == others["advantage"] == "–" and "data-advantage" not in second


def test_nothing_runs_but_the_table_s_own_script(tmp_path):
    names = {"reward": {HOSTILE: 1.0}, "config": HOSTILE}
    folder = run(tmp_path / "<img src=x onerror=alert(3)>", [answer(1, 7, rewards=names["reward"], completion=HOSTILE)])
    (folder / "config.json").write_text(json.dumps({"stage": "grpo", "recipe": names}))
    text = write_report(folder).read_text(encoding="utf-8")
    assert Table(text).tags.count("script") == Table(text).tags.count("img") == 0
    assert [part for part in re.findall(r"<script>(.*?)</script>", text, re.S)] == [SCRIPT]
    assert text.count("<script") == 1 and "<img" not in text and HOSTILE not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert policy and f"script-src 'sha256-{digest}'" in html.unescape(policy[1])
    assert "default-src 'none'" in policy[1] and "unsafe-inline" not in policy[1].partition("script-src")[2]


def test_of_many_answers_some_are_shown_and_the_rest_counted(tmp_path):
    lines = [answer(step, question) for step in range(100) for question in range(4) for _ in range(4)]
    lines[777] |= {"tokens": 900}
    lines[778] |= {"tokens": 800}
    found = read_rollouts(run(tmp_path, lines), 240)
    assert found.count == 1600 and 240 - LONGEST <= len(found.shown) <= 240
    groups = [(line["step"], line["question"]) for line in found.shown if line["tokens"] == 4]
    assert groups[:4] == [(0, 0)] * 4 and groups[-4:] == [(99, 3)] * 4
    whole = [group for group in set(groups) if groups.count(group) == 4]
    assert len(whole) >= (240 - LONGEST) // 4 - 2
    steps = sorted({step for step, _ in whole})
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 3, "evenly over the run"
    assert sorted(line["tokens"] for line in found.shown)[-2:] == [800, 900], "the longest are always there"
    text = write_report(tmp_path).read_text(encoding="utf-8")
    left = 1600 - len(found.shown)
    assert (
        f"{1600 - left} of 1,600 that were written down" in text
        and f"; {left:,} are left out" in text
        and len(Table(text).rows) == 1601 - left
    )
    assert len(read_rollouts(tmp_path, 10).shown) <= 10 and len(read_rollouts(tmp_path, 5000).shown) == 1600


def test_a_long_text_is_shortened_in_its_middle(tmp_path):
    told = "a" * 5000 + "&" * 3000 + "b" * 5000
    text = write_report(run(tmp_path, [answer(1, 7, completion=told)])).read_text(encoding="utf-8")
    shown = Table(text).rows[1][1]["completion"]
    half = CHARACTERS // 2
    assert shown == "a" * half + f"… {13000 - CHARACTERS:,} characters left out …" + "b" * half


def test_a_line_that_is_being_written_is_passed_over(tmp_path):
    folder = run(tmp_path, [answer(1, 7)])
    with (folder / "rollouts.jsonl").open("ab") as file:
        file.write('{"step": 2, "completion": "é'.encode()[:-1])
    assert read_rollouts(folder, 10).count == 1
    (folder / "rollouts.jsonl").write_text("{}x\n")
    with pytest.raises(ValueError, match=r"rollouts\.jsonl:1: not JSON"):
        write_report(folder)


def test_words_and_lengths_by_step(tmp_path):
    lines = [answer(1, 7, completion="Wait, but no", tokens=3), answer(1, 7, completion="no", tokens=9)]
    lines += [answer(5, 7, completion="wait wait check", tokens=5)]
    folder = run(tmp_path, lines)
    points = read_rollouts(folder, 10).points
    assert {name: values[:, :2].tolist() for name, values in points.items()} == {
        "longest": [[1, 9], [5, 5]],
        "reflective": [[1, 1.0], [5, 3]],
        "wait": [[1, 0.5], [5, 2]],
    }
    text = write_report(folder).read_text(encoding="utf-8")
    card = re.search(r"<figure><h3>Length and reflection</h3>(.*?)</figure>", text, re.S)
    assert card and "mean length, words of reflection (right), “wait” alone (right) over step" in card[1]
    assert "written down, 9 tokens at most" in text


def test_shares_of_time_and_of_clipped_tokens(tmp_path):
    logged = {"rollout_seconds": 6.0, "reward_seconds": 1.0, "train_seconds": 3.0, "samples_per_second": 12.5}
    folder = run(tmp_path, [], **logged, clip_fraction=0.0, odd_number=1.0)
    text = write_report(folder).read_text(encoding="utf-8")
    assert "rollout 60%, reward 10%, train 30% of all 20 s" in text and "<h3>Answers per second</h3>" in text
    assert "No token was clipped" in text and "<h3>Clipped</h3>" not in text and 'id="completions"' not in text
    rest = text[text.index("Everything else that was logged") :]
    assert "<h3>odd_number, GRPO</h3>" in rest and "<h3>reward_seconds" not in rest and "for seconds" not in text
    text = write_report(run(tmp_path, [], clip_fraction=0.125)).read_text(encoding="utf-8")
    assert "<h3>Clipped</h3>" in text and "No token was clipped" not in text


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_searches_and_sorts():
    program = (
        SCRIPT
        + """
      const rows = [{tokens: "5"}, {}, {tokens: "12"}, {tokens: "-1"}];
      console.log(JSON.stringify([
        matches("grpo, step 40 wait", "STEP wait"), matches("step 40", "step 41"), matches("x", ""), matches("x", " "),
        ...["-tokens", "tokens"].map(order => [...rows].sort(compare(order)).map(row => row.tokens)),
      ]));"""
    )
    command = ["node", "-e", f"globalThis.document = {{querySelectorAll: () => []}};{program}"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
    assert found == [True, False, True, True, ["12", "5", "-1", None], ["-1", "5", "12", None]]
