"""A server as it is started, but that the engine's process is a thread of this one: an engine to look into, the child
that has HTTP, and a port."""

import dataclasses
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import openai
from model.tiny import V3, config, weights, whole
from small import tokenizer

from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.serve.asking import Served
from deepseek_jax.serve.config import ServeConfig
from deepseek_jax.serve.engine_process import HttpProcess, Stopping, run

NETWORK = config(V3, num_hidden_layers=2, vocab_size=300, max_position_embeddings=512, num_nextn_predict_layers=0)
# Few shapes, for each is a program; pages for five answers of full length.
SERVING = ServingConfig(slots=8, pages=40, page=32, context=256, chunk=16, turns=4)
HOST = ServeConfig(port=0, name="tiny", queue=24)
# Every role and any tools have a place in it, in few tokens; calls are DeepSeek's, a switch opens the thinking.
TEMPLATE = """\
{% for message in messages %}{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] -%}
<｜tool▁call▁begin｜>{{ call.function.name }}<｜tool▁sep｜>{{ call.function.arguments }}<｜tool▁call▁end｜>
{%- endfor %}
{% endfor %}{{ tools | map(attribute='function.name') | join(' ') if tools }}{{ '<think>' if thinking }}"""


@dataclasses.dataclass
class Running:
    engine: Engine
    http: HttpProcess
    stopping: Stopping
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.http.url.rpartition(":")[2])

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.http.url}/v1", api_key="none", max_retries=0, timeout=60)

    def idle(self, seconds: float = 20.0) -> None:
        """Wait until nobody is answered; AssertionError where a page is lost, or where that does not come."""
        last = time.monotonic() + seconds
        while (told := self.engine.metrics())["waiting"] or told["running"] or told["pages_held"]:
            assert time.monotonic() < last, told
            time.sleep(0.02)
        self.engine.requests.continuous.check()


@contextmanager
def running(serve: ServeConfig = HOST, serving: ServingConfig = SERVING, template: str = "") -> Iterator[Running]:
    """template: of chats; by default DeepSeek's plain format."""
    words = tokenizer().with_template(template) if template else tokenizer()
    engine = Engine(whole(NETWORK, *weights(NETWORK), words), serving=serving)
    with tempfile.TemporaryDirectory() as folder, HttpProcess(serve) as http:
        words.save(folder)
        http.start(folder, "", NETWORK.vocab_size)
        engine.warm_up()
        served = Served(serve.name, engine.context, NETWORK.vocab_size, engine.slots)
        stopping, ready = Stopping(), threading.Event()
        thread = threading.Thread(target=run, args=(engine, http, served, stopping, ready.set))
        thread.start()
        try:
            while not ready.wait(0.05):
                assert thread.is_alive()
            assert get(f"{http.url}/health") == (200, "ready\n")
            yield Running(engine, http, stopping, thread)
        finally:
            if thread.is_alive():
                stopping.ask()
                http.kill()
            thread.join()
            stopping.close()


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)
