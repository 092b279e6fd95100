"""Bodies made from the server's own OpenAPI, right ones and wrong ones: never a 5xx, and many of them are answered."""

import collections

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from serve.fake import FakeAsker, fake_app

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}{{ tools or '' }}"
ASKER = FakeAsker(at_once=100)
ASKER.tokenizer = ASKER.tokenizer.with_template(TEMPLATE)  # every role and any tools have a place in it
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", fake_app(ASKER))


def found(cases: int) -> collections.Counter[int]:
    """Statuses of about so many: two thirds of them bodies as the schema has them, the others not."""
    found: collections.Counter[int] = collections.Counter()
    operations = [result.ok() for result in SCHEMA.get_all_operations()]  # pyright: ignore
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
    return found


@pytest.mark.parametrize("cases", [120, pytest.param(5000, marks=pytest.mark.slow)])
def test_bodies_from_openapi(cases):
    told = found(cases)
    answered = sum(count for status, count in told.items() if status < 300)
    assert told.total() > 0.8 * cases and answered >= 0.3 * told.total(), told
