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
    text, headers = _page()
    return Response(text, media_type="text/html", headers=headers)


@functools.cache
def _page() -> tuple[str, dict[str, str]]:
    text = PAGE.read_text(encoding="utf-8")
    rules = {"default-src": "'none'", "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'"}
    rules |= {"frame-ancestors": "'none'"} | {f"{part}-src": _digest(text, part) for part in ("script", "style")}
    policy = "; ".join(f"{name} {value}" for name, value in rules.items())
    return text, {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def _digest(text: str, name: str) -> str:
    """Of the one script or style, which alone the browser runs then."""
    (found,) = re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()}'"
