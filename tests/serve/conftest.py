"""OpenAI's client of a server that somebody made up answers for."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import openai
import pytest
from serve.fake import FakeAsker, fake_app
from serve.live import live


@pytest.fixture
def client() -> Iterator[Callable[[FakeAsker], openai.OpenAI]]:
    """Makes one for an asker."""
    with ExitStack() as stack:

        def made(asker: FakeAsker) -> openai.OpenAI:
            port = stack.enter_context(live(fake_app(asker)))
            return stack.enter_context(
                openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
            )

        yield made
