"""``deepseek-jax serve`` as a process of its own: it tells where it is, and ends when it is told to."""

import json
import signal
import socket
import subprocess
import urllib.request

import jax
import pytest
from cli.served import SERVE, SMALL, recipe, request, started, told
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax import save_hf
from deepseek_jax.cli.main import main
from deepseek_jax.serve.engine_process import HttpProcess


def test_sigterm_lets_streams_end(tmp_path):
    with started([*SERVE, recipe(tmp_path), "--random", "--port", "0", *SMALL]) as process:
        found = told(process, r"ready: (\S+)/v1 has mine, of 128 tokens; weights \S+ s, programs \S+ s")
        with urllib.request.urlopen(request(found[1], max_tokens=120, stream=True), timeout=60) as answer:
            first = answer.readline()
            process.send_signal(signal.SIGTERM)
            rest = answer.read()
        assert first.startswith(b"data: {") and rest.endswith(b'"finish_reason":"length"}]}\n\ndata: [DONE]\n\n')
        told(process, "ending")
        assert process.wait(30) == 0


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert subprocess.run([*SERVE, recipe(tmp_path), "--random", "--port", port]).returncode == 1
    said = capfd.readouterr().err
    assert f"127.0.0.1:{port}: Address already in use" in said and "weights" not in said


@pytest.mark.parametrize(
    "options, said",
    [
        (["--random", "--placement", "x.json"], "--random with placement"),
        (["--origins", "*"], "expected a page's, as https://chat.example"),
    ],
)
def test_what_would_do_nothing_is_refused(options, said, tmp_path, capsys):
    assert main(["serve", recipe(tmp_path), *options]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["int4", "float32"])
def test_int4_is_refused_before_weights_are_read(dtype, tmp_path, monkeypatch, capsys):
    """By a jax that cannot have it, be it the folder's or asked for."""
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    save_hf(whole(SPEAKER, *weights(SPEAKER), tokenizer()), tmp_path / "m", dtype=dtype)
    asked = [] if dtype == "int4" else ["--compute.param-dtype", "int4"]
    assert main(["serve", str(tmp_path / "m"), "--port", "0", *asked]) == 1
    said = capsys.readouterr().err
    assert "weights in int4" in said and "need jax 0.11" in said and "weights …" not in said


@pytest.mark.parametrize(
    "temperature, told", [(-1, ".temperature=-1.0: "), ("warm", "temperature='warm': expected a number")]
)
def test_a_generation_config_that_none_can_draw_by_is_told_before_weights_are_read(temperature, told, tmp_path, capsys):
    save_hf(whole(SPEAKER, *weights(SPEAKER), tokenizer()), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": temperature}))
    assert main(["serve", str(tmp_path), "--port", "0"]) == 1
    said = capsys.readouterr().err
    assert "generation_config.json: " in said and told in said and "weights …" not in said


@pytest.mark.parametrize("host, alone", [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_who_listens_to_others_without_a_key_is_told_so(host, alone, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(HttpProcess, "start", _ended)
    for keys in ("", "secret"):
        monkeypatch.setenv("DEEPSEEK_JAX_API_KEYS", keys)
        assert main(["serve", recipe(tmp_path), "--random", "--host", host, "--port", "0"]) == 1
        said = capsys.readouterr().err
        assert "enough" in said and ("whoever reaches" in said) == (not alone and not keys)


def _ended(*_) -> None:
    raise ValueError("enough")
