"""A hub on this machine: the parts of its API that a push and a download use."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

TOKEN = "hf_" + "secret" * 5
COMMIT = "c" * 40
_LARGE = (".safetensors", ".gguf")


@dataclass
class Hub:
    """What lies on the hub, and who may do what.

    ``failing`` answers a request whose line matches a pattern: by a status, or by hanging up (0).
    """

    url: str = ""
    repos: dict = field(default_factory=dict)
    private: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    commits: list = field(default_factory=list)
    failing: dict = field(default_factory=dict)
    me: dict = field(
        default_factory=lambda: {
            "type": "user",
            "name": "me",
            "orgs": [
                {"name": "lab", "roleInOrg": "write"},
                {"name": "readers", "roleInOrg": "read"},
            ],
            "auth": {"accessToken": {"displayName": "mine", "role": "write"}},
        }
    )

    def answer(self, line, token, body):
        """(status, headers, value or bytes) for a request."""
        for pattern, status in self.failing.items():
            if re.search(pattern, line):
                return status, {}, {"error": "as the test wants it"}
        for pattern, method in self._ROUTES:
            if found := re.fullmatch(pattern, line):
                if token != TOKEN and method is not Hub._resolve:
                    return 401, {}, {"error": "Invalid credentials"}
                return method(self, body, *map(unquote, found.groups()))
        return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}

    def _whoami(self, _body):
        return 200, {}, self.me

    def _create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization'] or self.me['name']}/{asked['name']}"
        status = 409 if name in self.repos else 200
        self.repos.setdefault(name, {})
        self.private.setdefault(name, asked.get("visibility") == "private" or asked.get("private"))
        return status, {}, {"url": f"{self.url}/{name}"}

    def _info(self, _body, name):
        if name not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        siblings = [{"rfilename": file} for file in self.repos[name]]
        return 200, {}, {"_id": "1", "id": name, "sha": COMMIT, "siblings": siblings, "tags": []}

    def _folder(self, _body, _name):
        return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "EntryNotFound"}

    def _tree(self, _body, name):
        files = self.repos[name].items()
        return 200, {}, [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files
        ]  # fmt: skip

    def _yaml(self, _body):
        return 200, {}, {"errors": [], "warnings": []}

    def _preupload(self, body, _name):
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
            }
            for one in json.loads(body)["files"]
        ]  # fmt: skip
        return 200, {}, {"files": files}

    def _batch(self, body, name):
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.url}/put/{name}/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        return 200, {}, {"transfer": "basic", "objects": objects}

    def _put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        return 200, {}, {}

    def _commit(self, body, name):
        for line in body.splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "header":
                self.commits.append(value["summary"])
            elif one["key"] == "file":
                self.repos[name][value["path"]] = base64.b64decode(value["content"])
            else:
                self.repos[name][value["path"]] = self.objects[value["oid"]]
        return 200, {}, {"commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}

    def _resolve(self, _body, name, path):
        file = self.repos.get(name, {}).get(path)
        if file is None:
            code = "EntryNotFound" if name in self.repos else "RepoNotFound"
            return 404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, {"error": code}
        etag = f'"{hashlib.sha256(file).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": COMMIT}, file

    _ROUTES = (
        (r"GET /api/whoami-v2", _whoami),
        (r"POST /api/repos/create", _create),
        (r"POST /api/validate-yaml", _yaml),
        (r"GET /api/models/([^/]+/[^/]+)/tree/[^/]+/.*", _folder),
        (r"GET /api/models/([^/]+/[^/]+)/tree/[^/]+", _tree),
        (r"GET /api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", _info),
        (r"POST /api/models/([^/]+/[^/]+)/preupload/main", _preupload),
        (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
        (r"PUT /put/.+/([0-9a-f]{64})", _put),
        (r"POST /api/models/([^/]+/[^/]+)/commit/main", _commit),
        (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/[^/]+/(.+)", _resolve),
    )


@contextmanager
def hub_here():
    """A hub that listens on this machine until the body ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            line = f"{self.command} {self.path}"
            hub.requests.append(line)
            if self.path.startswith("/put/"):  # signed links carry no token
                token = TOKEN
            status, headers, value = hub.answer(line, token, body)
            if not status:
                self.close_connection = True
                self.connection.close()
                return
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, one in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, one)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _answer  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
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
    """A hub of this machine that huggingface_hub asks, with a token that may write."""
    with hub_here() as here:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", here.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield here
