"""How the server listens, and what it takes at most."""

import dataclasses
import os
from pathlib import Path

from deepseek_jax.inference.limits import CHARACTERS, GRAMMAR, STRINGS
from deepseek_jax.typed import check_least, check_types

KEYS = "DEEPSEEK_JAX_API_KEYS"  # environment: keys, separated by commas


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request; what passes one is refused with status 400, a body with 413."""

    body: int = 1 << 20
    """Bytes of a body."""
    max_tokens: int = 0
    """Tokens of an answer, whatever is asked for; 0: as many as the context has room for."""
    n: int = 16
    """Answers to a prompt, and prompts in a body times answers."""
    stops: int = STRINGS
    """Stop strings."""
    stop_length: int = CHARACTERS
    """Characters of one."""
    messages: int = 1024
    """Messages of a conversation."""
    tools: int = 128
    """Tools that are described."""
    schema_bytes: int = GRAMMAR
    """Bytes of a JSON schema or of a tool's, characters of an expression; no more than the engine takes."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "body", "n", "stops", "stop_length", "messages", "tools", "schema_bytes")
        if self.schema_bytes > GRAMMAR:
            raise ValueError(f"schema_bytes={self.schema_bytes}: expected at most {GRAMMAR}, which the engine takes")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """An address, who may come, and how many wait."""

    host: str = "127.0.0.1"
    """The address to listen at: of this machine alone, or 0.0.0.0 for every one that reaches it."""
    port: int = 8000
    """0: any that is free."""
    name: str = ""
    """What requests call the model; by default the name of its folder."""
    api_keys_file: str = ""
    """A file with a key a line, one of which every request must bring; also taken from $DEEPSEEK_JAX_API_KEYS."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a request's Host may have, beside localhost and addresses; "*": any."""
    origins: tuple[str, ...] = ()
    """Of other pages that may use this server, as https://chat.example (CORS); its own page always may."""
    queue: int = 256
    """Answers that may wait for the engine beyond those that it makes at once; who comes then is told to come again
    (429)."""
    connections: int = 2048
    """Open at once; who comes then is refused (503)."""
    drain_seconds: float = 600.0
    """What running answers are given to end in, once the process was told to (SIGTERM, Ctrl-C)."""
    stall_seconds: float = 60.0
    """A client that reads nothing for so long, while there is something to read, is cut off."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "connections", "stall_seconds")
        if wrong := [each for each in self.origins if not each.startswith(("http://", "https://"))]:
            raise ValueError(f"origins={wrong[0]!r}: expected a page's, as https://chat.example")
        if self.port >= 1 << 16:
            raise ValueError(f"port={self.port}: expected below 65536")

    @property
    def alone(self) -> bool:
        """Whether it listens to this machine alone."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def keys(self) -> tuple[str, ...]:
        """The API keys, none where any request may come in. ValueError: a file without any."""
        found = [*os.environ.get(KEYS, "").split(",")]
        if self.api_keys_file:
            told = Path(self.api_keys_file).read_text(encoding="utf-8").split("\n")
            if not any(map(str.strip, told)):
                raise ValueError(f"api_keys_file={self.api_keys_file!r} holds no key")
            found += told
        return tuple(key.strip() for key in found if key.strip())
