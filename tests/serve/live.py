"""An app behind a port, in a thread."""

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from deepseek_jax.serve.protocol import BoundedProtocol


@contextmanager
def live(app: Any, **bounds: Any) -> Iterator[int]:
    """The port. bounds: of the protocol."""
    http: Any = functools.partial(BoundedProtocol, **bounds)
    config = uvicorn.Config(app, port=0, http=http, lifespan="off", log_config=None, ws="none")
    server, listener = uvicorn.Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
