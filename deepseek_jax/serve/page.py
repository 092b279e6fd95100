"""The page at ``/``: one static file, which may run its own script and ask this server, and nothing else."""

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

PAGE = Path(__file__).with_name("page.html")


async def page(request: Request) -> Response:
    return Response(_text(), media_type="text/html", headers=page_headers())


@functools.cache
def page_headers() -> dict[str, str]:
    rules = {"default-src": "'none'", "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'"}
    rules |= {"frame-ancestors": "'none'"} | {f"{part}-src": _digest(part) for part in ("script", "style")}
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in rules.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


@functools.cache
def _text() -> str:
    return PAGE.read_text(encoding="utf-8")


def _digest(name: str) -> str:
    """Of the one script or style, which alone the browser runs then."""
    (found,) = re.findall(rf"<{name}>(.*?)</{name}>", _text(), re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()}'"
