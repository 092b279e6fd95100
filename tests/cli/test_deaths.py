"""How ``deepseek-jax serve`` ends where it is not let: nobody waits for ever, and no process is left."""

import contextlib
import http.client
import os
import re
import signal
import sys
import urllib.request

from cli.served import SERVE, SMALL, children, ended, recipe, request, started, told
from model.tiny import weights, whole
from serve.engine import get
from small import SPEAKER, tokenizer

from deepseek_jax import save_hf

LONG = {"max_tokens": 3000, "stream": True}
ROOM = (*SMALL, "--serving.pages", "1024", "--serving.context", "4000")
READY = r"ready: (\S+)/v1 "
# It reads weights for as long as a test takes.
READING = """
import sys, time
from deepseek_jax.checkpoint.safetensors import TensorFiles
from deepseek_jax.cli.main import main
def slowly(self, name):
    print("reading", name, file=sys.stderr, flush=True)
    time.sleep(300)
TensorFiles.array = slowly
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def rest(answer: http.client.HTTPResponse) -> bytes:
    """What still comes, until it ends or breaks off."""
    came = b""
    with contextlib.suppress(http.client.HTTPException, ConnectionError):
        while some := answer.read1():
            came += some
    return came


def test_two_stand_beside_each_other_and_each_falls_alone(tmp_path):
    command = [*SERVE, recipe(tmp_path), "--random", "--port", "0", *ROOM]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(started(command))
        urls = [told(first, READY)[1]]  # the second then compiles nothing
        second = stack.enter_context(started(command))
        urls.append(told(second, READY)[1])
        https = [child for process in (first, second) for child in children(process.pid)]
        assert len(set(urls)) == len(set(https)) == 2
        answers = [urllib.request.urlopen(request(url, max_tokens=9, temperature=0), timeout=60).read() for url in urls]
        texts = [re.search(rb'"text":"[^"]*"', answer) for answer in answers]
        assert texts[0] and texts[1] and texts[0][0] == texts[1][0]

        # The child is killed in mid-stream: its engine tells, and ends.
        with urllib.request.urlopen(request(urls[0], **LONG), timeout=60) as answer:
            assert answer.readline().startswith(b"data: {")
            os.kill(https[0], signal.SIGKILL)
            assert b"[DONE]" not in rest(answer)
        told(first, "the HTTP process has ended, with status -9")
        assert first.wait(30) == 1 and not children(first.pid)
        assert get(f"{urls[1]}/health") == (200, "ready\n")

        # The engine's process is: the child tells whoever is there, and ends.
        with urllib.request.urlopen(request(urls[1], **LONG), timeout=60) as answer:
            assert answer.readline().startswith(b"data: {")
            second.kill()
            assert b"the engine has ended" in rest(answer)
        assert second.wait(30) == -9 and ended(https[1])
        assert get(f"{urls[1]}/health")[0] == 0


def test_a_second_sigterm_stops_at_once(tmp_path):
    with started([*SERVE, recipe(tmp_path), "--random", "--port", "0", *ROOM]) as process:
        url = told(process, READY)[1]
        (child,) = children(process.pid)
        with urllib.request.urlopen(request(url, **LONG), timeout=60) as answer:
            assert answer.readline().startswith(b"data: {")
            process.terminate()
            told(process, "once more: at once")
            assert answer.read(1000).count(b"data: {") > 1  # it goes on
            process.terminate()
            assert b"[DONE]" not in rest(answer)
        told(process, "stopped at once")
        assert process.wait(10) == 130 and ended(child)


def test_killed_while_it_reads_weights_it_leaves_nothing(tmp_path):
    save_hf(whole(SPEAKER, *weights(SPEAKER), tokenizer()), tmp_path / "model", dtype="float32")
    with started([sys.executable, "-c", READING, str(tmp_path / "model"), "--port", "0"]) as process:
        told(process, "reading ")
        (child,) = children(process.pid)
        process.kill()
        assert process.wait(30) == -9 and ended(child)
