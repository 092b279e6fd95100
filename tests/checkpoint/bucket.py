"""A bucket of Google Cloud Storage in this process's memory: as much of its JSON API as tensorstore and gcsfs ask for.

The emulators on PyPI leave out generations, by which tensorstore tells whether an object has changed.
"""

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from urllib.parse import parse_qs, quote, unquote, urlsplit


class Bucket(BaseHTTPRequestHandler):
    """Requests to one bucket, whatever its name. objects: bytes and generation by name."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[bytes, int]]
    generation = 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        name = self._name()
        if name is None:
            self._list() if self.path.split("?")[0].endswith("/o") else self._answer(200, {"name": "bucket"})
            return
        content, generation = self.objects.get(name, (b"", 0))
        asked = self._asked()
        if not generation:
            self._answer(404, {"error": {"code": 404, "message": name}})
        elif asked.get("ifGenerationNotMatch") == str(generation):
            self._answer(304)
        elif asked.get("ifGenerationMatch", str(generation)) != str(generation):
            self._answer(412)
        elif asked.get("alt") == "media":
            self._send(content, generation)
        else:
            self._answer(200, self._about(name))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/batch/"):
            names = [unquote(each) for each in re.findall(r"DELETE \S*?/o/([^ ?]+)", body.decode())]
            for name in names:
                self.objects.pop(name, None)
            head = "--x\r\nContent-Type: application/http\r\nContent-ID: <response-{}>\r\n\r\n"
            parts = [head.format(i + 1) + "HTTP/1.1 204 No Content\r\n\r\n\r\n" for i in range(len(names))]
            self._send(("".join(parts) + "--x--").encode(), 0, kind="multipart/mixed; boundary=x")
            return
        asked = self._asked()
        name = asked.get("name")
        if asked.get("uploadType") == "resumable":
            name = name or json.loads(body)["name"]
            self._answer(200, headers={"Location": f"http://{self.headers['Host']}/upload?name={quote(name, safe='')}"})
            return
        if asked.get("uploadType") == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])
            assert boundary is not None
            _, about, data, *_ = body.split(b"--" + boundary[1].encode())
            name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            body = re.split(rb"\r?\n\r?\n", data, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r")
        assert name is not None, self.path
        with self.lock:
            known = self.objects.get(name, (b"", 0))[1]
            if asked.get("ifGenerationMatch", str(known)) != str(known):
                self._answer(412)
                return
            Bucket.generation += 1
            self.objects[name] = body, Bucket.generation
        self._answer(200, self._about(name))

    do_PUT = do_POST  # of one part: what is uploaded here is small

    def do_DELETE(self) -> None:
        found = self.objects.pop(self._name() or "", None)
        self._answer(404 if found is None else 204)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _list(self) -> None:
        prefix, delimiter = self._asked().get("prefix", ""), self._asked().get("delimiter")
        names = sorted(name for name in self.objects if name.startswith(prefix))
        if delimiter:
            below = [name for name in names if delimiter in name[len(prefix) :]]
            folders = sorted({prefix + name[len(prefix) :].split(delimiter)[0] + delimiter for name in below})
            names = [name for name in names if name not in below]
            self._answer(200, {"items": [self._about(name) for name in names], "prefixes": folders})
        else:
            self._answer(200, {"items": [self._about(name) for name in names]})

    def _about(self, name: str) -> dict[str, str]:
        content, generation = self.objects[name]
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        return {"name": name, "bucket": "bucket", "size": str(len(content)), "generation": str(generation)} | times

    def _name(self) -> str | None:
        match = re.search(r"/b/[^/]+/o/(.+)", urlsplit(self.path).path)
        return None if match is None else unquote(match[1])

    def _asked(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}

    def _answer(self, status: int, content: object = None, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, content: bytes, generation: int, kind: str = "application/octet-stream") -> None:
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        part = content
        if span is not None:
            first = int(span[1]) if span[1] else len(content) - int(span[2])
            last = min(int(span[2]), len(content) - 1) if span[1] and span[2] else len(content) - 1
            part = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("x-goog-generation", str(generation))
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none of ours."""


@contextmanager
def served() -> Iterator[tuple[dict[str, str], dict[str, tuple[bytes, int]]]]:
    """(The environment in which gs://bucket/ is here, and its objects)."""
    Bucket.objects = {}
    server = _Server(("127.0.0.1", 0), Bucket)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    environment |= {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "any", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    try:
        yield environment, Bucket.objects
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
