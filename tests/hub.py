"""A hub on this machine: the parts of its API that a download uses."""

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

from shallower.texts import hub as of_hub
from shallower.texts.hub import hub_files

TOKEN = "hf_" + "secret" * 5
COMMIT = "c" * 40


@dataclass
class Hub:
    """What lies on the hub.

    ``failing`` answers a request whose line matches a pattern: by a status, by one and the hub's
    code of the error, or by hanging up (0). The name of a dataset begins with ``datasets/``.
    ``sent`` is what was sent of files by ranges: name, first byte, the one past the last;
    ``num_sent`` counts the bytes of all answers. ``spoil``
    changes such an answer: its name, status, headers and bytes. ``away`` sends files of weights
    from another server, which must see no token, as the hub does.
    """

    url: str = ""
    repos: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    failing: dict = field(default_factory=dict)
    sent: list = field(default_factory=list)
    num_sent: int = 0
    spoil: Callable = field(default=lambda _name, *answer: answer)
    away: bool = False

    def put(self, name, folder):
        """Put the files of a folder, and of those in it, on the hub."""
        self.repos[name] = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }

    def part(self, line, answer, asked):
        """The answer to a request that asked for a range of bytes."""
        status, headers, data = answer
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")
        if not found or status != 200 or not isinstance(data, BYTES):
            return answer
        start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
        name = line.rpartition("/")[2]
        self.sent.append((name, start, stop))
        headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        return self.spoil(name, 206, headers, data[start:stop])

    def answer(self, line, token):
        """(status, headers, value or bytes) for a request."""
        for pattern, failure in self.failing.items():
            if re.search(pattern, line):
                status, *code = failure if isinstance(failure, tuple) else (failure,)
                headers = {"X-Error-Code": code[0]} if code else {}
                return status, headers, {"error": "as the test wants it"}
        if found := re.fullmatch(r"GET /away/([^/]+/[^/]+)/(.+)", line):
            assert not token
            return 200, {"ETag": '"of the other server"'}, self.repos[found[1]][found[2]]
        for pattern, method in self._ROUTES:
            if found := re.fullmatch(pattern, line):
                if token != TOKEN and method is not Hub._resolve:
                    return 401, {}, {"error": "Invalid credentials"}
                return method(self, *map(unquote, found.groups()))
        return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}

    def _dataset(self, name):
        return self._info(f"datasets/{name}")

    def _dataset_tree(self, name):
        return self._tree(f"datasets/{name}")

    def _allowed(self, kind, name):
        return self._info(name if kind == "models" else f"datasets/{name}")

    def _info(self, name):
        if name not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        siblings = [
            {"rfilename": file, "size": len(data), "blobId": _sha(data)} | _lfs(file, data)
            for file, data in self.repos[name].items()
        ]
        return 200, {}, {"_id": "1", "id": name, "sha": COMMIT, "siblings": siblings, "tags": []}

    def _folder(self, _name):
        return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "EntryNotFound"}

    def _tree(self, name):
        files = self.repos[name].items()
        return 200, {}, [
            {"type": "file", "path": path, "size": len(data), "oid": _sha(data)[:40]}
            for path, data in files
        ]  # fmt: skip

    def _resolve(self, name, path):
        file = self.repos.get(name, {}).get(path)
        if file is None:
            code = "EntryNotFound" if name in self.repos else "RepoNotFound"
            return 404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, {"error": code}
        etag = f'"{_sha(file)}"'
        if self.away and path.endswith(".safetensors"):
            place = f"{self.url.replace('127.0.0.1', 'localhost')}/away/{name}/{path}"
            return 302, {"X-Linked-Etag": etag, "Location": place}, b""
        return 200, {"ETag": etag, "X-Repo-Commit": COMMIT}, file

    _ROUTES = (
        (r"GET /api/(models|datasets)/([^/]+(?:/[^/]+)?)/auth-check", _allowed),
        (r"GET /api/models/([^/]+/[^/]+)/tree/[^/]+/.*", _folder),
        (r"GET /api/models/([^/]+/[^/]+)/tree/[^/]+", _tree),
        (r"GET /api/models/([^/]+/[^/?]+)(?:/revision/[^/]+)?(?:\?.*)?", _info),
        (r"GET /api/datasets/([^/]+/[^/]+)/tree/[^/?]+(?:[/?].*)?", _dataset_tree),
        (r"GET /api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", _dataset),
        (r"(?:GET|HEAD) /((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", _resolve),
    )


BYTES = bytes | memoryview
_SHAS = {}


def _sha(data):
    """Hash a file; a large one, which is no bytes but a view, once."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    return _SHAS.setdefault(id(data), hashlib.sha256(str(id(data)).encode()).hexdigest())


def _lfs(file, data):
    """What the hub tells of a file of weights, whose SHA-256 it knows."""
    if not file.endswith(".safetensors"):
        return {}
    return {"lfs": {"sha256": _sha(data), "size": len(data), "pointerSize": 134}}


@contextmanager
def hub_here():
    """A hub that listens on this machine until the body ends."""
    hub, counting = Hub(), threading.Lock()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *request):
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(*request)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self):
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            line = f"{self.command} {self.path}"
            hub.requests.append(line)
            status, headers, value = hub.part(
                line, hub.answer(line, token), self.headers.get("Range")
            )
            if not status:
                self.close_connection = True
                self.connection.close()
                return
            data = value if isinstance(value, BYTES) else json.dumps(value).encode()
            self.send_response(status)
            for name, one in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, one)
            self.end_headers()
            try:
                for start in range(0, 0 if self.command == "HEAD" else len(data), 1 << 20):
                    count = self.wfile.write(data[start : start + (1 << 20)])
                    with counting:
                        hub.num_sent += count
            except ConnectionError:  # who asked is gone
                self.close_connection = True

        do_GET = do_HEAD = _answer  # noqa: N815

        def log_message(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of this machine that huggingface_hub asks, with a token."""
    hub_files.cache_clear()  # a commit of one hub is not that of the next
    with hub_here() as here:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", here.url)
        monkeypatch.setattr(of_hub, "HUB", here.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield here
