"""Two real processes answer requests as they come: what one answers, whoever asks, and without a compile behind."""

import dataclasses
import json
import re
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from inference.ahead import sent_ahead
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from model.tiny import weights, whole
from parallel.two_processes import free_port, start
from small import SPEAKER, tokenizer

from deepseek_jax import save_hf
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh

SERVING = ServingConfig(slots=2, pages=8, page=4, context=32, chunk=8, turns=2, score=True)
SCORED = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=True, alternatives=2)
# (the process that asks, the step before which it does, prompt, parameters, draw)
ASKED = [
    (0, 0, [5, 9, 2, 7] * 3, SamplingParams(temperature=0.0, max_tokens=8), 0),
    (1, 0, [8, 8, 1], SamplingParams(max_tokens=9, seed=3, logit_bias=((11, -2.5),)), 2),
    (0, 1, [5, 9, 2, 7] * 3, SamplingParams(temperature=0.7, max_tokens=8), 1),
    (1, 1, [8, 8, 1], SamplingParams(max_tokens=12, regex="[ab]{3,9}"), 1),
    (0, 2, [7, 3], SamplingParams(max_tokens=14, seed=4, json_schema='{"enum": ["one", "two", 3]}'), 0),
    *((i % 2, 2 + i // 6, [i + 3] * (i + 1), SamplingParams(temperature=0.0, max_tokens=12), 0) for i in range(18)),
    (1, 3, [5, 9, 2, 7] * 3, SCORED, 0),
    (0, 4, [11, 4, 9] * 6, dataclasses.replace(SCORED, max_tokens=0), 0),
]
HELD = 3, 4  # to a grammar
CANCELLED = 7
# The first process drives, the second follows, and asks from another thread.
PROGRAM = """
import sys
from pathlib import Path
from parallel.test_serving import answers
Path(sys.argv[1], f"said.{jax.process_index()}").write_text(answers(ahead=sys.argv[2] == "True"))
"""


SERVE = """
import sys
from deepseek_jax.cli.main import main
sizes = ["--serving.slots", "2", "--serving.pages", "8", "--serving.page", "4", "--serving.chunk", "8"]
where = ["--mesh.expert", "2", "--host", "127.0.0.1", "--port", sys.argv[2]]
sys.exit(main(["serve", sys.argv[1], *sizes, *where]))
"""


def mesh_of_four() -> Mesh:
    """Requests and experts by two, heads by the other two."""
    return make_mesh(MeshConfig(expert=2, tensor=2), jax.devices()[:4])


def placed(arrays: Any) -> Any:
    whole = NamedSharding(mesh_of_four(), PartitionSpec())
    put = lambda x: jax.make_array_from_callback(x.shape, whole, lambda at: x[at])  # noqa: E731
    return jax.tree.map(put, jax.device_get(arrays))


def engine(**more: Any) -> Engine:
    params, bias = placed(weights(SPEAKER))
    return Engine(whole(SPEAKER, params, bias, tokenizer(), mesh_of_four()), serving=SERVING, **more)


def answers(*, ahead: bool) -> str:
    """This process's, as JSON: [place in ASKED, tokens, log-probabilities, those of a prompt among them, why it ended];
    and what was counted."""
    serving, here, alone = engine(), jax.process_index(), jax.process_count() == 1
    if ahead:
        serving = sent_ahead(serving)
    serving.warm_up()
    places, found = dict[int, int](), dict[int, list]()
    for now in range(200):
        for place, (process, when, prompt, sampling, draw) in enumerate(ASKED):
            if when == now and (alone or process == here):
                number = serving.submit(prompt, sampling, draw=draw)
                places[number], found[place] = place, [[], [], ""]
        if now == 4 and (alone or here == ASKED[CANCELLED][0]):
            serving.cancel(next(number for number, place in places.items() if place == CANCELLED))
        for event in serving.step():
            answer = found[places[event.number]]
            answer[0] += event.token_ids
            answer[1] += [*(event.prompt.logprobs if event.prompt else ()), *event.logprobs]
            answer[2] = event.finish_reason
        if now > 4 and not serving.busy:
            break
    assert not serving.busy
    if here == 0 and not alone:
        serving.end()
    elif not alone:
        serving.follow()
    # Rows in turn, and rows of which several ask the same: the second process has fewer.
    prompts = [prompt for prompt in ([5, 9, 2, 7], [8, 8, 1]) for _ in range(4)]
    prompts = prompts[: 6 if alone or not here else 0] + prompts[: 3 if alone or here else 0]
    key, sampling = jax.random.fold_in(jax.random.key(0), 2**31), SamplingParams(max_tokens=5, temperature=0.8)
    together = [serving.generate_ids(prompts, sampling, key).here().tokens_BN[: len(prompts), :5].tolist()]
    in_turn = engine(at_once=3)
    together.append(in_turn.generate_ids(prompts, sampling, key).here().tokens_BN.tolist())
    refused(serving, in_turn)
    metrics = {name: value for name, value in serving.metrics().items() if not name.startswith("seconds")}
    serving.requests.continuous.check()
    return json.dumps({"found": found, "metrics": metrics, "together": together})


def refused(together: Engine, in_turn: Engine) -> None:
    """What is wrong with a row of the last process alone, all are told."""
    last = jax.process_index() + 1 == jax.process_count()
    plain, held = SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, regex="a+")
    for engine, match in ((in_turn, "json_schema, regex: for requests"), (together, "regex=a[+]: for requests")):
        with pytest.raises(ValueError, match=match):
            engine.generate_ids([[5, 9]], [held if last else plain])
    params, bias = placed(weights(SPEAKER))
    in_turn.update(params | {"embed": params["embed"].at[7].set(jnp.nan)}, bias)
    with pytest.raises(ArithmeticError, match="prompt 1: .*NaN"):
        in_turn.generate_ids([[5, 9], [7] if last else [8], [6]], plain)


@pytest.mark.parametrize("ahead", [False, True])
def test_two_processes_answer_what_one_answers(ahead: bool, tmp_path: Path):
    with start(PROGRAM, [tmp_path, ahead], folder=tmp_path, devices=2) as group:
        group.done()
    first, second = (json.loads((tmp_path / f"said.{index}").read_text()) for index in range(2))
    alone = json.loads(answers(ahead=ahead))
    assert not first["found"].keys() & second["found"].keys() and first["metrics"] == second["metrics"]
    for each in zip(*(said["together"] for said in (first, second, alone)), strict=True):
        assert each[0] + each[1] == each[2]
    assert alone["together"][0] == alone["together"][1]
    found = first["found"] | second["found"]
    assert found.keys() == alone["found"].keys() == set(map(str, range(len(ASKED))))
    assert found.pop(str(CANCELLED))[2] == alone["found"].pop(str(CANCELLED))[2] == "cancelled"
    for place, (ids, logprobs, reason) in found.items():
        expected = alone["found"][place]
        assert (ids, reason) == (expected[0], expected[2])
        assert logprobs == pytest.approx(expected[1], abs=1e-4)  # others may stand beside it
    texts = [tokenizer().decode(found[str(place)][0][:-1]) for place in HELD]
    assert re.fullmatch("[ab]{3,9}", texts[0]) and json.loads(texts[1]) in ("one", "two", 3)
    for metrics in (first["metrics"], alone["metrics"]):
        assert metrics["preemptions"] and metrics["found_tokens"] and not metrics["compiles"]
        assert not metrics["pages_held"]


@pytest.mark.slow
def test_two_processes_serve(tmp_path: Path):
    """The first has HTTP; told to end, it ends the second too."""
    save_hf(whole(SPEAKER, *weights(SPEAKER), tokenizer()), tmp_path / "model", dtype="float32")
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/completions"
    body = {"model": "model", "prompt": "12+34=", "max_tokens": 8, "temperature": 0, "logprobs": 0}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with start(SERVE, [tmp_path / "model", port], folder=tmp_path, devices=1) as group:
        for _ in range(240):
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    said = json.loads(response.read())
                break
            except (urllib.error.URLError, ConnectionError):  # not yet
                assert all(process.poll() is None for process in group.processes)
                time.sleep(0.5)
        group.signal(0, signal.SIGTERM)
        group.done(60)
    (expected,) = Engine(whole(SPEAKER, *weights(SPEAKER), tokenizer())).generate(
        ["12+34="], SamplingParams(temperature=0.0, max_tokens=8)
    )
    assert said["choices"][0]["text"] == expected.text
