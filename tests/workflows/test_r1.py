"""All stages of R1: what each leaves, what is refused, and an end in each, from which the same command goes on."""

import dataclasses
import io
import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from rich.console import Console
from workflows import tiny_r1
from workflows.miniature import run_program

from deepseek_jax.data.special_tokens import THINK
from deepseek_jax.rl import arithmetic, sampler
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.rl.words import wait_words
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.workflows import r1 as r1_module
from deepseek_jax.workflows import r1_data, r1_requests
from deepseek_jax.workflows.corpus import CorpusConfig
from deepseek_jax.workflows.questions import Answers
from deepseek_jax.workflows.r1 import STAGES as ALL
from deepseek_jax.workflows.r1 import R1Config, check_files, check_inputs, make_links, r1
from deepseek_jax.workflows.r1_data import R1Data, make_data
from deepseek_jax.workflows.recipe import load_recipe
from deepseek_jax.workflows.row_batches import LoaderBatches

STAGES = [name for name in ALL if name not in ("zero_longer", "preferences")]  # the miniature's
pytestmark = pytest.mark.timeout(900)  # twice sixteen stages, each of which compiles programs of its own
CLOCKS = ("time", "peak_bytes_process")


class KilledError(BaseException):
    """The end of a process, as far as one can have it within another."""


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def run(config: R1Config, folder: Path) -> str:
    out = io.StringIO()
    r1(dataclasses.replace(config, run_dir=str(folder)), Console(file=out, width=200))
    return out.getvalue()


def end_in(stage: str, monkeypatch) -> None:
    """Raise in the middle of a stage: while it writes, at a batch, within a rollout, between answers."""
    owner, name, after = {
        "data": (r1_data, "train_on_files", 1),
        **dict.fromkeys(("zero", "reasoning", "all_scenarios"), (sampler, "converse", 4)),
        **dict.fromkeys(("cold_start_samples", "samples", "evaluation"), (Answers, "_ask", 2)),
    }.get(stage, (LoaderBatches, "next", 4))
    original, original_stage = getattr(owner, name), ALL[stage]
    calls = 0

    def counted(*args, **options):
        nonlocal calls
        calls += 1
        if calls == after:
            raise KilledError(stage)
        return original(*args, **options)

    def watched(config):
        if Path(config.run_dir).name == stage:
            monkeypatch.setattr(owner, name, counted)
        return original_stage(config)

    monkeypatch.setitem(r1_module.STAGES, stage, watched)


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    """A few rows a step are enough, which eight devices could not share."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: devices)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run that nothing disturbed, and what it said."""
    folder = tmp_path_factory.mktemp("r1")
    tiny_r1.write_questions(folder)
    return folder, run(tiny_r1.config(folder), folder / "run")


def test_each_stage_leaves_data_settings_metrics_and_samples(finished):
    folder, said = finished
    for stage in STAGES:
        assert f"{stage} → {folder}/run/{stage}" in said
        assert (folder / "run" / stage / "result.json").is_file()
        settings = json.loads((folder / "run" / stage / "config.json").read_text())
        assert settings["recipe"]["run_dir"] == f"{folder}/run/{stage}"
    for stage in ("zero", "reasoning", "all_scenarios"):
        assert lines_of(folder / "run" / stage / "rollouts.jsonl")
    for stage in ("cold_start_samples", "samples"):
        assert lines_of(folder / "run" / stage / "kept.jsonl")
    names = {name for line in read_metrics(folder / "run" / "all_scenarios") for name in line}
    assert {"reward_accuracy", "reward_model.helpful", "reward_model.harmless"} <= names
    figures = json.loads((folder / "run" / "evaluation" / "result.json").read_text())
    assert figures.keys() == {"pretrain", "all_scenarios", "student"}
    assert all(found.keys() == {"problems", "requests"} for found in figures.values())
    assert (folder / "run" / "report.html").is_file()


def kill_in_zero(folder: Path, run_dir: Path) -> None:
    """The command as a program of its own, with a real kill -9 within a rollout."""
    recipe = run_dir.parent / "recipe.py"
    made = f"def config():\n    return tiny_r1.config(Path({str(folder)!r}))\n"
    recipe.write_text(f"from pathlib import Path\n\nimport tiny_r1\n\n{made}", encoding="utf-8")
    program = str(Path(tiny_r1.__file__).with_name("killed.py"))
    killed = run_program(program, "grpo", "4", "r1", str(recipe), "--run-dir", str(run_dir), cwd=run_dir.parent)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def test_ended_in_every_stage_and_moved_it_goes_on_to_the_bit(finished, tmp_path, monkeypatch):
    folder, _ = finished
    config = tiny_r1.config(folder)
    for number, stage in enumerate(STAGES):
        place = tmp_path / f"run{number}"
        if stage == "zero":
            kill_in_zero(folder, place)
        else:
            with monkeypatch.context() as patch, pytest.raises(KilledError, match=stage):
                end_in(stage, patch)
                run(config, place)
        assert not (place / stage / "result.json").exists()
        place.rename(tmp_path / ("run" if stage == STAGES[-1] else f"run{number + 1}"))
    said = run(config, tmp_path / "run")
    assert said.count("is done already") == len(STAGES) - 1 and "evaluation → " in said
    for found, wanted in ((tmp_path / "run" / stage, folder / "run" / stage) for stage in STAGES):
        if (wanted / "metrics.jsonl").exists():
            same_lines(found, wanted)
        for file in wanted.glob("kept.jsonl"):
            assert (found / file.name).read_bytes() == file.read_bytes()
        answers = [path for path in found.rglob("rows-*.jsonl")]
        assert {path.name for path in answers} == {path.name for path in wanted.rglob("rows-*.jsonl")}
        for path in answers:
            assert set(Counter((line["question"], line["sample"]) for line in lines_of(path)).values()) == {1}
    assert results(tmp_path / "run") == results(folder / "run")


def same_lines(found: Path, wanted: Path) -> None:
    lines = [
        [{k: v for k, v in line.items() if k not in CLOCKS and "second" not in k} for line in read_metrics(path)]
        for path in (found, wanted)
    ]
    assert lines[0] == lines[1], found.name


def results(run_dir: Path) -> dict:
    return json.loads((run_dir / "evaluation" / "result.json").read_text())


def test_a_second_call_does_nothing_wherever_the_run_lies(finished, tmp_path, monkeypatch):
    folder, _ = finished
    shutil.copytree(folder / "run", tmp_path / "moved")
    for stage in STAGES:
        monkeypatch.setitem(r1_module.STAGES, stage, None)  # would be called, and cannot
    said = run(tiny_r1.config(folder), tmp_path / "moved")
    assert said.count("is done already") == len(STAGES)
    other = dataclasses.replace(tiny_r1.config(folder), seed=1)
    with pytest.raises(ValueError, match="holds a run with other settings: seed is 0 there and 1 here"):
        run(other, tmp_path / "moved")


def test_what_a_stage_reads_must_be_there_or_come_before(tmp_path):
    config = dataclasses.replace(tiny_r1.config(tmp_path), run_dir=str(tmp_path / "run"), skip=("helpful",))
    message = r"all_scenarios.reward='.*run/helpful': it is not there, and the stage helpful is not run before"
    with pytest.raises(ValueError, match=message):
        check_inputs(make_links(config))
    with pytest.raises(ValueError, match="no stage 'helpfull'; did you mean helpful"):
        R1Config(skip=("helpfull",))
    with pytest.raises(ValueError, match="zero.run_dir='runs/r1/other': its last part must be 'zero'"):
        R1Config(zero=dataclasses.replace(config.zero, run_dir="runs/r1/other"))


def test_no_samples_and_a_stage_skipped_half_done_are_named(tmp_path, monkeypatch):
    """Else the sft would learn the general chats alone, and from a base that is not what it was to be."""
    config = tiny_r1.config(tmp_path)
    tiny_r1.write_questions(tmp_path)
    skip = tuple(name for name in ALL if name not in ("samples", "sft"))
    config = dataclasses.replace(config, run_dir=f"{tmp_path}/run/", skip=skip)
    for file in ("data/requests_sft.jsonl", "reasoning/model", "pretrain/checkpoints/20/model", "zero/checkpoints/6/x"):
        (tmp_path / "run" / file).parent.mkdir(parents=True)
        (tmp_path / "run" / file).touch()
    (tmp_path / "run" / "zero" / "result.json").write_text('{"steps": 6}')

    def keeps_nothing(samples):
        Path(samples.run_dir).mkdir()
        (Path(samples.run_dir) / "kept.jsonl").touch()

    for stage, run_stage in (("samples", keeps_nothing), ("sft", None)):
        monkeypatch.setitem(r1_module.STAGES, stage, run_stage)
    out = io.StringIO()
    message = f"{tmp_path}/run/samples/kept.jsonl is empty: none of the teacher's answers was kept"
    with pytest.raises(ValueError, match=message):
        r1(config, Console(file=out, width=200))
    assert out.getvalue() == (
        "pretrain is skipped half done: what starts from it takes its checkpoint of step 20\n"
        f"samples → {tmp_path}/run/samples\n"
    )
    with pytest.raises(ValueError, match=message):
        check_inputs(make_links(dataclasses.replace(config, skip=(*skip, "samples"))))


def test_files_and_models_of_ones_own_are_looked_for_before_the_first_stage(tmp_path):
    config = dataclasses.replace(tiny_r1.config(tmp_path), run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"pretrain: .*pages.jsonl: there is no such file"):
        check_files(make_links(config))
    tiny_r1.write_questions(tmp_path)
    check_files(make_links(config))
    rows = tmp_path / "open.jsonl"
    rows.write_text('{"prompt": "q"}\n')
    evaluation = dataclasses.replace(config.evaluation, problems=TaskConfig(path=(str(rows),)))
    with pytest.raises(ValueError, match='evaluation: .*open.jsonl:1: no column "answer"'):
        check_files(make_links(dataclasses.replace(config, evaluation=evaluation)))
    with pytest.raises(ValueError, match="student: nowhere does not exist"):
        check_files(
            make_links(dataclasses.replace(config, student=dataclasses.replace(config.student, init_from="nowhere")))
        )


def test_another_base_stands_in_the_place_of_pretraining(tmp_path):
    config = dataclasses.replace(tiny_r1.config(tmp_path), base="/a/base")
    links = {link.name: link.config for link in make_links(config)}
    assert "pretrain" not in links
    assert links["zero"].init_from == links["cold_start"].init_from == links["sft"].init_from == "/a/base"
    assert links["evaluation"].base == "/a/base"
    config = dataclasses.replace(config, base=config.pretrain.run_dir, run_dir="elsewhere")  # another run's
    links = {link.name: link.config for link in make_links(config)}
    assert links["zero"].init_from == config.base and links["zero"].run_dir == "elsewhere/zero"
    assert links["reasoning"].init_from == "elsewhere/cold_start"


def test_a_stage_of_a_recipe_is_a_recipe(tmp_path):
    whole = load_recipe("r1/miniature", R1Config)
    own = tmp_path / "own.py"
    own.write_text(
        "import dataclasses\n"
        "from deepseek_jax.workflows.r1 import R1Config\n"
        "from deepseek_jax.workflows.recipe import load_recipe\n"
        'def config(): return dataclasses.replace(load_recipe("r1/miniature", R1Config), base="/a/base")\n'
    )
    assert load_recipe(f"{own}:zero", type(whole.zero)).init_from == "/a/base"
    assert load_recipe("r1/miniature:zero", type(whole.zero)) == whole.zero
    with pytest.raises(ValueError, match="has no stage 'zerro'; it has data, pretrain, zero"):
        load_recipe("r1/miniature:zerro", R1Config)
    with pytest.raises(ValueError, match="this command takes a GRPOConfig, as r1/miniature:zero is"):
        load_recipe("r1/miniature", type(whole.zero))


# ---- its data ----


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    corpus = CorpusConfig(vocab_size=400, max_code_bytes=100_000, sft_per_kind=1, train_per_kind=50, heldout_per_kind=9)
    make_data(R1Data(run_dir=str(folder), corpus=corpus, pages=600, request_pages=200, preferences=50))
    return folder


def test_the_base_reads_no_word_of_reflection(data):
    """R1-Zero's growth of them is counted from a base whose data held none."""
    documents = lines_of(data / "documents" / "train.jsonl")
    kinds = Counter(document["kind"] for document in documents)
    assert kinds.keys() == {"arithmetic", "code", "page", "prose"} and kinds["page"] == 800
    assert sum(wait_words(document["text"]) for document in documents) == 0


def test_pages_answer_right_and_ask_nothing_that_is_held_out(data):
    pages = [line["text"] for line in lines_of(data / "documents" / "train.jsonl") if line["kind"] == "page"]
    asked = Counter()
    right = {problem.prompt: problem.answer for problem in arithmetic.all_problems(held_out=False)}
    wrong = {problem.prompt for problem in arithmetic.all_problems(held_out=True)}
    for page in pages:
        question, answer = page.removeprefix("User: ").split("\nAssistant: ")
        assert question not in wrong
        if question in right:
            asked["thought" if THINK in answer else "plain"] += 1
            assert answer.split("<answer>")[-1].removesuffix("</answer>") == right[question]
    assert asked["plain"] + asked["thought"] == 600 and 0.4 < asked["plain"] / 600 < 0.6
    held_out = {request.prompt for request in r1_requests.all_requests(held_out=True)}
    assert not [page for page in pages if any(prompt in page for prompt in held_out)]
    for name in ("requests_train", "helpful", "harmless"):
        assert not held_out & {row["prompt"] for row in lines_of(data / f"{name}.jsonl")}


def test_preferences_are_by_rule(data):
    for row in lines_of(data / "helpful.jsonl"):
        assert row["chosen"] != row["rejected"]
    labels = Counter((row["label"], "cannot help" in row["response"]) for row in lines_of(data / "harmless.jsonl"))
    assert (
        labels["unsafe", True] == 0 and labels["unsafe", False] > 5 and labels["safe", True] == labels["unsafe", False]
    )
