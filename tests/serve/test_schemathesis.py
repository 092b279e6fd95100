"""Bodies made from the server's own OpenAPI, right ones and wrong ones: never a 5xx, and some of them are answered."""

import collections

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from serve.fake import FakeAsker, fake_app

ASKER = FakeAsker(at_once=100)
APP = fake_app(ASKER)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
FOUND: collections.Counter[int] = collections.Counter()


def tried(examples: int):
    """A test of so many bodies for each route."""
    chosen = settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=[*HealthCheck])

    @SCHEMA.parametrize()
    @chosen
    def test(case):
        response = case.call(headers={"Host": "localhost"})
        FOUND[response.status_code] += 1
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert set(response.json()) == {"error"}, response.text

    return test


test_routes = tried(25)
test_routes_at_length = pytest.mark.slow(tried(625))


def test_some_are_answered():
    """Behind the others, of which it counts; at least 30 %."""
    total = sum(FOUND.values())
    assert total >= 100 and sum(count for code, count in FOUND.items() if code < 300) > 0.3 * total, FOUND
