"""The report of a demo run, made from synthetic runs: what it must show, and what it must survive."""

import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from deepseek_jax.train.run_lock import run_lock
from deepseek_jax.workflows.compare import different_settings, print_comparison, read_runs, write_comparison
from deepseek_jax.workflows.report import print_summary, write_report
from deepseek_jax.workflows.report_figures import OVER, UNDER, Line, Panel, heat_map, line_chart

LAYERS, EXPERTS = 2, 4
HOSTILE = "</pre><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"
SECTIONS = ["headline", "losses", "experts", "reward", "samples", "completions", "configuration"]


class Page(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}

    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.tags if "id" in attributes]


def write_stage(run: Path, name: str, *, finished: bool = True, folder: Path | None = None) -> None:
    folder = folder or run / name
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(0, 101, 10):
            load = [[0.4, 0.3, 0.2, 0.1]] * LAYERS
            line = {
                "step": step,
                "time": 0.0,
                "load": load,
                "max_vio": 0.6,
                "balance": 1e-4,
                "bias_range": 0.1,
            }
            if name == "grpo":
                line |= {
                    "reward_accuracy": 0.3,
                    "reward_format": 0.9,
                    "response_length": 40.0,
                    "entropy": 0.3,
                }
                line |= {"kl_sampler": 1e-8, "kl_reference": 0.0, "signal_groups": 0.5}
            else:
                line |= {"ce": float("nan") if step == 50 else 3.0, "mtp": 4.0, "tokens_per_second": 5432.0}
            file.write(json.dumps(line) + "\n")
        evaluation = {"eval/bits_per_byte": 2.25} if name == "pretrain" else {}
        if name != "pretrain":
            for mode, value in (("sampled", 0.25), ("greedy", 0.5)):
                evaluation |= {f"eval/accuracy_{mode}": value, f"eval/accuracy_{mode}_stderr": 0.03}
        file.write(json.dumps({"step": 100, "time": 0.0} | evaluation) + "\n")
    write_json(folder / "config.json", {"model": {"note": f"{name} <b>bold</b>"}})
    share = np.full((4, LAYERS, EXPERTS), 0.25)
    share[2, 1] = [0.0, 0.0, 0.9, 0.1]
    share[3, 1] = float("nan")  # no such token was met
    kinds = ["code", "prose", "digits", "thinking"]
    experts = {"kinds": kinds, "layers": LAYERS, "experts": EXPERTS, "share": share.tolist()}
    write_json(folder / "experts.json", experts)
    sample = {"stage": name, "prompt": f"1 + 1 {HOSTILE}", "answer": "2", "mode": "greedy"}
    before = {"when": "before", "completion": f"<think>never closed {HOSTILE}", "correct": False}
    after = {"when": "after", "completion": "<think>one more than one</think>it is 2", "correct": True}
    lines = [json.dumps(sample | before), json.dumps(sample | after)]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    if finished:
        write_result(folder, name)


def write_result(folder: Path, name: str) -> None:
    result = {"seconds": 61.2, "steps": 100, "tokens_per_second": 6123.4, "cache_numbers_per_token_layer": 48}
    result |= {"parameters_total": 2_312_448, "parameters_active": 1_130_112}
    if name == "pretrain":
        result["bits_per_byte"] = 2.104
    else:
        sampled, greedy = (0.312, 0.45) if name == "sft" else (0.871, 0.93)
        result |= {"accuracy_sampled": sampled, "accuracy_sampled_stderr": 0.021, "problems": 512}
        result |= {"accuracy_greedy": greedy, "accuracy_greedy_stderr": 0.014}
        result["by_kind"] = {"add": {"greedy": greedy, "sampled": sampled}}
    write_json(folder / "result.json", result)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    for name in ("pretrain", "sft", "grpo"):
        write_stage(tmp_path, name)
    (tmp_path / "corpus").mkdir()
    write_json(tmp_path / "corpus" / "meta.json", {"vocab_size": 512, "note": "<i>corpus</i>"})
    return tmp_path


def summary(run: Path) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_summary(run, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_report_is_one_file_that_needs_nothing_else(full_run: Path) -> None:
    path = write_report(full_run)
    assert path == full_run / "report.html" and not (full_run / "report.html.tmp").exists()
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.names() & {"link", "iframe", "object", "embed", "base", "img", "image"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in {"src", "href", "xlink:href", "action", "data"}, (tag, value)
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


def test_hostile_text_is_shown_but_not_run(full_run: Path) -> None:
    text = write_report(full_run).read_text(encoding="utf-8")
    assert html.escape(HOSTILE) in text and HOSTILE not in text
    assert "<b>bold</b>" not in text and "<i>corpus</i>" not in text


def test_every_section_and_chart_is_there(full_run: Path) -> None:
    text = write_report(full_run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.ids() == SECTIONS
    charts = [
        "Held-out accuracy",
        "Loss, Pretraining",
        "Loss, Cold-start SFT",
        "Held-out text, Pretraining",
        "MaxVio",
    ]
    charts += ["Balance loss", "Router bias", "Reward", "Response length", "Groups with signal", "Entropy"]
    charts += ["Sampler-to-learner KL", "Reference KL"]
    charts += [f"{what}, MoE layer {layer}" for what in ("Load", "Kind of token") for layer in (1, 2)]
    for title in charts:
        card = re.search(rf"<figure><h3>{re.escape(title)}</h3>(.*?)</figure>", text, re.S)
        assert card and "<svg" in card[1] and re.search(r"<figcaption>.+\.</figcaption>", card[1]), title
    assert "nan" not in text.lower(), "a NaN loss must leave a gap"
    assert "the most marked is expert 2 with 3.6× for digits" in text
    assert "not complete" not in text and "Not measured yet" not in text


def test_samples_stand_side_by_side_with_marks_and_dimmed_thinking(full_run: Path) -> None:
    text = write_report(full_run).read_text(encoding="utf-8")
    pairs = re.findall(r'<div class="pair">.*?</pre></div></div>', text, re.S)
    assert len(pairs) == 3
    assert pairs[0].index("✗ wrong") < pairs[0].index("✓ right")
    assert '<span class="think">&lt;think&gt;one more than one&lt;/think&gt;</span>it is 2' in pairs[0]
    assert f'<span class="think">&lt;think&gt;never closed {html.escape(HOSTILE)}</span>' in pairs[0]


def test_what_a_stage_began_with_is_what_the_one_before_ended_with(full_run: Path) -> None:
    for name, said in (("sft", "it was 3"), ("grpo", "it is 2")):
        sample = {"prompt": "1 + 1", "answer": "2", "mode": "greedy", "when": "after", "correct": name == "grpo"}
        other = sample | {"prompt": f"only {name}"}
        lines = [json.dumps(line | {"completion": said}) for line in (sample, other)]
        (full_run / name / "samples.jsonl").write_text("\n".join(lines) + "\n")
    text = write_report(full_run).read_text(encoding="utf-8")
    shared, alone = re.findall(r'<div class="pair">.*?</div></div>(?=<div class="pair">|</details>)', text, re.S)[:2]
    assert shared.index("it was 3") < shared.index("it is 2") and "not recorded" not in shared
    assert "only grpo" in alone and "not recorded" in alone


NUMBERS = ["87.1 ± 2.1%", "93.0 ± 1.4%", "31.2 ± 2.1%", "45.0 ± 1.4%", "2.104", "6,123", "1m 02s", "512"]
NUMBERS += ["2,312,448", "1,130,112", "48", "finished"]


def test_terminal_and_page_print_the_same_numbers(full_run: Path) -> None:
    printed, page = summary(full_run), html.unescape(write_report(full_run).read_text(encoding="utf-8"))
    page = page.replace("\N{NO-BREAK SPACE}", " ")
    for number in NUMBERS:
        assert number in printed and number in page, number
    row = next(line for line in printed.splitlines() if "sampled accuracy before" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["–", "–", "31.2 ± 2.1%"], "GRPO starts where SFT ended"


def test_evaluation_at_step_0_is_the_accuracy_before(full_run: Path) -> None:
    path = full_run / "grpo" / "metrics.jsonl"
    first = {"step": 0, "eval/accuracy_sampled": 0.28, "eval/accuracy_sampled_stderr": 0.02}
    path.write_text(json.dumps(first) + "\n" + path.read_text())
    assert "28.0 ± 2.0%" in next(line for line in summary(full_run).splitlines() if "sampled accuracy before" in line)


def test_nothing_has_run_yet(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "holds no run: neither a stage's config.json"),
        (tmp_path / "x", "x does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            write_report(path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "pretrain").mkdir()
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert Page(text).ids() == [name for name in SECTIONS if name != "completions"] and "<svg" not in text
    assert "Pretraining is not started; Cold-start SFT is not started; GRPO is not started" in text
    assert summary(tmp_path).count("not started") == 3


def own_run(folder: Path, stage: str, **recipe) -> Path:
    """A stage's own folder, of somebody's own data."""
    write_stage(folder, stage, folder=folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    for line in lines:
        line |= {"tokens_seen": 64_000 * line["step"], "seconds": 30.0 + 6 * line["step"], "loss": 4.0}
        line.pop("eval/accuracy_greedy", None)
        if stage == "grpo":
            line.pop("balance", None)
            line |= {"reward": line["step"] / 100, "reward_<mine>": -0.5, "reward_timeouts": 2.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "config.json", {"stage": stage, "recipe": {"run_dir": str(folder), **recipe}})
    result = json.loads((folder / "result.json").read_text())
    write_json(folder / "result.json", result | {"peak_bytes_device": 12_340_000_000, "perplexity": 17.25})
    return folder


@pytest.mark.parametrize(
    ("stage", "there", "not_there"),
    [
        ("pretrain", ["Loss, Pretraining", "MaxVio", "12.34 GB", "17.25"], ["Reinforcement", "Reward"]),
        ("sft", ["Loss, SFT", "what assistants say", "Load, MoE layer 2"], ["Cold-start", "Reinforcement"]),
        (
            "grpo",
            ["The mean reward went from 0", "&lt;mine&gt; (-0.5", "Entropy"],
            ["Balance loss", "for timeouts", "Loss,"],
        ),
    ],
)
def test_the_folder_of_a_single_stage_has_a_report_of_its_own(tmp_path, stage, there, not_there):
    folder = own_run(tmp_path / stage, stage)
    if stage == "sft":
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 100, "ce": 2.9, "eval/loss": 1.5}) + "\n")
    text = write_report(folder).read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    assert "not started" not in text and "Not measured yet" not in text and "not complete" not in text
    for part in there:
        assert part in text, part
    for part in not_there:
        assert part not in text, part
    printed = summary(folder)
    assert "finished" in printed and "not started" not in printed


def test_runs_side_by_side(tmp_path):
    paths = [own_run(tmp_path / "a" / "<run>", "pretrain", optimizer={"peak_lr": 0.01}, seed=1)]
    paths.append(own_run(tmp_path / "b" / "<run>", "pretrain", optimizer={"peak_lr": 0.02}, seed=1))
    paths.append(
        own_run(
            tmp_path / "b" / "third",
            "pretrain",
            optimizer={"peak_lr": 0.01},
            seed=1,
            model={"width": "[/INST] 8 :key:"},
        )
    )
    runs = read_runs(paths)
    assert [run.title for run in runs] == ["a/<run>", "b/<run>", "third"]
    assert different_settings(runs) == [
        ("optimizer.peak_lr", ["0.01", "0.02", "0.01"]),
        ("model.width", ["\N{EN DASH}", "\N{EN DASH}", "[/INST] 8 :key:"]),
    ]
    sft = own_run(tmp_path / "sft", "sft", optimizer={"peak_lr": 0.02}, batch_size=8, check={"count": 3})
    assert different_settings(read_runs([paths[2], sft])) == [
        ("stage", ["pretrain", "sft"]),
        ("optimizer.peak_lr", ["0.01", "0.02"]),
        ("settings that not all stages have", ["2", "2"]),  # seed, model.width; batch_size, check.count
    ]
    console = Console(file=io.StringIO(), width=120)
    print_comparison(runs, console)
    text = write_comparison(runs, tmp_path / "out.html").read_text(encoding="utf-8")
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "[/INST] 8 :key:",
        "optimizer.peak_lr",
        "0.02",
        "6,123",
        "2,312,448",
        "12.34 GB",
        "17.25",
        "6,400,000",
        "1m 02s",
    ):
        assert part in printed and part in text, part
    titles = ["Loss of the next token over tokens", "Loss of the next token over time", "Held-out text over tokens"]
    for title in [*titles, "MaxVio over tokens", "Speed over tokens"]:
        card = re.search(rf"<figure><h3>{title}</h3>(.*?)</figure>", text, re.S)
        assert card and ("million tokens" in card[1] or "minutes" in card[1]), title
        assert card[1].count('class="key"') == 3 and "a/&lt;run&gt;" in card[1]
    assert "<run>" not in text and not Page(text).names() & {"script", "link", "img"}


def test_runs_of_grpo_side_by_side(tmp_path):
    runs = read_runs([own_run(tmp_path / name, "grpo", reward=[name]) for name in ("a", "b")])
    text = write_comparison(runs, tmp_path / "out.html").read_text(encoding="utf-8")
    for row in ("last reward for &lt;mine&gt;", "last reward for format", "last mean length of an answer"):
        assert row in text, row
    named = [
        "Reward",
        "Reward for accuracy",
        "Reward for format",
        "Reward for &lt;mine&gt;",
        "Response length",
        "Entropy",
    ]
    for title in named:
        card = re.search(rf"<figure><h3>{title} over tokens</h3>(.*?)</figure>", text, re.S)
        assert card and card[1].count('class="key"') == 2, title
    assert "timeouts" not in text and "Loss of the next token" not in text and "Words of reflection" not in text


def test_lines_are_where_tokens_and_minutes_say(tmp_path):
    for name, speed in (("slow", 2), ("fast", 1)):
        folder = own_run(tmp_path / name, "pretrain")
        lines = [{"step": s, "ce": 9.0 - s, "seconds": 100 + speed * 300 * s, "tokens_seen": 10 * s} for s in range(3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_comparison(read_runs([tmp_path / "slow", tmp_path / "fast"]), tmp_path / "x.html").read_text()

    def ends(title):
        card = re.search(rf"<h3>{title}</h3>(.*?)</figure>", text, re.S)
        assert card
        return [
            float(path.split("L")[-1].split(",")[0]) for path in re.findall(r'class="line"[^>]* d="M([^"]+)"', card[1])
        ]

    assert ends("Loss of the next token over tokens") == pytest.approx([350, 350])
    assert ends("Loss of the next token over time") == pytest.approx([350, 44 + (350 - 44) / 2])


def test_what_cannot_be_compared_is_refused(full_run, tmp_path):
    own = own_run(tmp_path / "own", "sft")
    for paths, message in (
        ([own], "1 runs, 1 of them different: expected 2 to 12"),
        ([own, tmp_path / "x" / ".." / "own"], "2 runs, 1 of them different"),
        ([own, full_run], "holds several runs: name one, of .*pretrain, .*sft, .*grpo"),
    ):
        with pytest.raises(ValueError, match=message):
            read_runs(paths)


def test_run_that_is_still_going(tmp_path: Path) -> None:
    write_stage(tmp_path, "pretrain")
    write_stage(tmp_path, "sft", finished=False)
    (tmp_path / "sft" / "experts.json").unlink()
    with (tmp_path / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "ce": 2.')  # the line that is being written just now
    assert "Cold-start SFT is stopped at step 100; GRPO" in write_report(tmp_path).read_text(encoding="utf-8")
    with run_lock(tmp_path / "sft"):
        text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Cold-start SFT is running, step 100; GRPO is not started" in text
    assert "Reinforcement learning has no accuracy to show yet" in text
    assert "take after Pretraining" in text and "Not measured yet." in text
    printed = summary(tmp_path)
    assert "25.0 ± 3.0%" in printed and "5,432" in printed, "the last logged numbers, until there are final ones"


def test_broken_line_is_named(full_run: Path) -> None:
    path = full_run / "sft" / "samples.jsonl"
    path.write_text("{}\nbroken\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl:2: not JSON"):
        write_report(full_run)
    (full_run / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: holds a list, not an object"):
        write_report(full_run)


def test_line_chart_puts_values_where_the_axis_says() -> None:
    points = np.array([[0, 0.0, 0], [50, 40.0, 0], [100, 100.0, 0]])
    svg = line_chart([Panel("only", 100)], [Line("x", "blue", [points])], unit="%", low=0, high=100)
    path = re.findall(r'class="line"[^>]* d="M([^"]+)"', svg)[0]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in path.split("L"))
    labels = re.findall(r'<text class="label" x="([\d.]+)" y="([\d.]+)" text-anchor="end">([\d.]+)</text>', svg)
    y_of = {text: float(y) - 4 for x, y, text in labels if float(x) < 44}
    assert (y0, y1, y2) == pytest.approx((y_of["0"], y_of["40"], y_of["100"]), abs=0.11)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.11)


def test_heat_map_colours_say_under_and_over() -> None:
    svg = heat_map(np.array([[1.0, 0.25], [9.0, 0.0]]), [Panel("a", 0), Panel("b", 0)], limit=4, numbers=True)
    cells = {}
    for colour, opacity, path in re.findall(r'<path stroke="([^"]+)" opacity="([^"]+)" d="([^"]+)"/>', svg):
        for column, row in re.findall(r"M(\d+) (\d+)h1", path):
            cells[int(row), int(column)] = colour, float(opacity)
    assert cells == {(0, 1): (UNDER, 0.8), (1, 0): (OVER, 0.8), (1, 1): (UNDER, 0.8)}, "the fair share has no colour"
    assert re.findall(r'class="cell"[^>]*>([\d.]+)<', svg) == ["1.0", "0.2", "9.0", "0.0"]
