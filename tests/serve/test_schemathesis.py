"""Bodies made from the server's own OpenAPI, right ones and wrong ones, for an engine that is made up and for the whole
server: never a 5xx, and many of them are answered."""

import collections
import dataclasses
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from serve.engine import HOST, SERVING, TEMPLATE, running
from serve.fake import FakeAsker, fake_app

from deepseek_jax.serve.config import Limits

FEW = Limits(max_tokens=8, n=4)  # of answers that are really made


def ask_by(schema: Any, cases: int) -> None:
    """About so many times: two thirds of them bodies as the schema has them, the others not."""
    found: collections.Counter[int] = collections.Counter()
    operations = [result.ok() for result in schema.get_all_operations()]
    bodied = [operation for operation in operations if operation.method == "post"]
    for operation in operations:
        modes = [(GenerationMode.POSITIVE, 1)]
        if operation in bodied:
            each = cases // len(bodied)
            modes = [(GenerationMode.POSITIVE, each * 2 // 3), (GenerationMode.NEGATIVE, each // 3)]
        for mode, count in modes:

            @settings(max_examples=count, phases=[Phase.generate], suppress_health_check=[*HealthCheck])  # pyright: ignore
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                response = case.call(headers={"Host": "localhost"})
                found[response.status_code] += 1
                assert response.status_code < 500, response.text
                if response.status_code >= 400:
                    assert set(response.json()) == {"error"}, response.text

            ask()
    answered = sum(count for status, count in found.items() if status < 300)
    assert found.total() > 0.8 * cases and answered >= 0.3 * found.total(), found


@pytest.mark.parametrize("cases", [120, pytest.param(5000, marks=pytest.mark.slow)])
def test_bodies_from_openapi(cases):
    asker = FakeAsker(at_once=100)
    asker.tokenizer = asker.tokenizer.with_template(TEMPLATE)
    ask_by(schemathesis.openapi.from_asgi("/openapi.json", fake_app(asker)), cases)


@pytest.mark.parametrize("cases", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_the_whole_server_is_asked_by_its_openapi(cases, capfd):
    host = dataclasses.replace(HOST, limits=FEW)
    with running(host, dataclasses.replace(SERVING, score=True), TEMPLATE) as server:
        ask_by(schemathesis.openapi.from_url(f"{server.http.url}/openapi.json"), cases)
        server.idle()
        assert server.engine.metrics()["compiles"] == 0
    said = capfd.readouterr().err
    assert "Traceback" not in said and "failed" not in said, said  # a stream that has begun has no other status
