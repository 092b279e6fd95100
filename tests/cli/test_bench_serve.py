"""``bench serve`` against a server that answers as it is told to."""

import asyncio
import dataclasses
import json
import threading

import pytest

from deepseek_jax.cli import bench_client, bench_serve
from deepseek_jax.cli.main import main


class Fake:
    """Answers each request with ``events`` of ``size`` tokens, ``gap`` seconds apart, and counts those under way."""

    def __init__(self, events=4, size=2, gap=0.01, fail=lambda number: ""):
        self.events, self.size, self.gap, self.fail = events, size, gap, fail
        self.asked, self.at_once, self.most = [], 0, 0

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.answer, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.server.close()
        self.loop.run_until_complete(self.server.wait_closed())
        self.loop.close()

    async def answer(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]) if b"POST" in head else 0
        body = await reader.readexactly(length)
        if not length:
            told = json.dumps({"data": [{"id": "fake"}]}).encode()
            writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(told) + told)
            writer.close()
            return
        self.asked.append(asked := json.loads(body))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        how = self.fail(len(self.asked))
        if how == "ids":
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 13\r\n\r\nvocab_size=64")
        elif how == "status":
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nbusy")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(self.events):
                await asyncio.sleep(self.gap)
                self.piece(writer, {"choices": [{"text": "é" * self.size, "index": 0, "finish_reason": None}]})
                if how == "cut":
                    break
            else:
                self.piece(writer, {"choices": [{"text": "", "finish_reason": "length"}]})
                found = {"cached_tokens": len(asked["prompt"]) // 4}
                usage = {"prompt_tokens": len(asked["prompt"]), "prompt_tokens_details": found}
                usage["completion_tokens"] = self.events * self.size
                self.piece(writer, {"choices": [], "usage": usage})
                writer.write(b"e\r\ndata: [DONE]\n\n"[:-1] + b"\n\r\n0\r\n\r\n")
        self.at_once -= 1
        writer.close()

    def piece(self, writer, told):
        data = b"data: " + json.dumps(told, ensure_ascii=False).encode() + b"\n\n"
        half = len(data) // 2  # an event may come in two
        for part in (data[:half], data[half:]):
            writer.write(b"%x\r\n" % len(part) + part + b"\r\n")


def options(fake, **changes):
    return bench_serve.BenchServeConfig(**{"url": fake.url, "input_tokens": 8, "output_tokens": 8, **changes})


def test_a_closed_loop():
    with Fake() as fake:
        found = bench_serve.measure(options(fake, concurrency=3, requests=7))
    assert (found["answered"], found["failures"], found["events"], found["output tokens"]) == (7, {}, 28, 56)
    assert found["found"] == 0.25
    assert fake.most == 3 and len(fake.asked) == 8
    assert all(body["model"] == "fake" and len(body["prompt"]) == 8 and body["stream"] for body in fake.asked)
    assert found["time to first token"]["p50"] >= 0.01 and found["between events"]["p50"] >= 0.009
    assert 0.003 < found["a token"]["p50"] < found["between events"]["p99"]
    assert found["output tokens a second"] == pytest.approx(56 / found["seconds"])


def test_arrivals_at_a_rate_by_two_processes():
    with Fake(gap=0.05) as fake:
        found = bench_serve.measure(options(fake, rate=200.0, requests=12, concurrency=2, processes=2))
    assert found["answered"] == 12 and fake.most > 2


def test_failures_are_counted_and_told():
    with Fake(fail=lambda number: {3: "status", 4: "cut"}.get(number, "")) as fake:
        found = bench_serve.measure(options(fake, concurrency=1, requests=4, warm_up=1))
    assert (found["answered"], found["requests"]) == (2, 4)
    assert found["failures"] == {"status 429: busy": 1, "cut off": 1}


def test_ids_that_are_refused_name_the_option():
    with Fake(fail=lambda number: "ids") as fake, pytest.raises(RuntimeError, match="vocab_size=64 .*--ids 1000"):
        bench_serve.measure(options(fake))


def test_the_command(tmp_path, capsys):
    network = tmp_path / "config.json"
    network.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "max_position_embeddings": 64,
                "vocab_size": 64,
                "hidden_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 16,
            }
        )
    )
    with Fake() as fake:
        line = ["bench", "serve", fake.url, "--concurrency", "2", "--requests", "4", "--input-tokens", "4"]
        line += ["--recipe", str(network), "--bandwidth", "10", "--json", str(tmp_path / "out.json")]
        assert main(line) == 0
        with pytest.raises(SystemExit):
            main(["bench", "serve", fake.url, "--endpoint", "chat"])
        assert main(["bench", "serve", "http://127.0.0.1:9/v1", "--model", "m"]) == 1
    said = capsys.readouterr()
    assert all(part in said.out for part in ("time to first token", "output tokens/s", "allow for", "25% of the"))
    assert "takes no ids" in said.out + said.err and "no connection" in said.err
    assert json.loads((tmp_path / "out.json").read_text())["answered"] == 4


def test_load_is_split_evenly():
    """Each part has as many rounds of requests as the others."""
    bodies = [str(i) for i in range(256)]
    load = bench_client.Load("http://h/", bodies, {}, concurrency=64, rate=64.0, timeout=1.0, seed=0)
    parts = bench_client.split(load, 3)
    assert [part.concurrency for part in parts] == [21, 21, 22] == [part.rate for part in parts]
    assert [len(part.bodies) for part in parts] == [84, 84, 88] and sum((part.bodies for part in parts), []) == bodies
    few = bench_client.split(dataclasses.replace(load, bodies=bodies[:3]), 3)
    assert [part.bodies for part in few] == [["0"], ["1"], ["2"]] and sum(part.rate for part in few) == 64
