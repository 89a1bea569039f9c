"""A small Hub on the loopback: what huggingface_hub really asks of one when it makes, fills, reads and lists a model.

Commits, branches, pull requests and large files are kept in memory. Faults are statuses that the n-th request of a
kind gets in place of an answer, or what is done before it is answered.
"""

import base64
import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "x7Kq" * 8
READ_TOKEN = "hf_" + "r3Ad" * 8
ME = "me"

KINDS = (
    ("create", "POST", r"/api/repos/create"),
    ("whoami", "GET", r"/api/whoami-v2"),
    ("yaml", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)"),
    ("commit", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)"),
    ("branch", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)"),
    ("discussions", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions"),
    ("xet", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/xet-write-token/(?P<revision>[^/]+)"),
    ("tree", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)"),
    ("info", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?"),
    ("batch", "POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("upload", "PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    ("verify", "POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify"),
    ("file", "HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("file", "GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
)


@dataclass
class Commit:
    """A state of the files, by path."""

    oid: str
    files: dict[str, bytes]
    title: str = ""


@dataclass
class Repo:
    """One model: its branches, each a list of commits, and its pull requests by number."""

    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    requests: dict[int, str] = field(default_factory=dict)

    def commits(self, revision: str) -> list[Commit] | None:
        if revision in self.branches:
            return self.branches[revision]
        for commits in self.branches.values():
            for number, commit in enumerate(commits):
                if commit.oid == revision:
                    return commits[: number + 1]
        return None


class Hub(ThreadingHTTPServer):
    """The server. `log` has the kind of every request; `faults[kind]` its statuses in turn, 0 for a true answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[str] = []
        self.tokens: list[str] = []
        self.faults: dict[str, list[int]] = defaultdict(list)
        self.headers_of_faults: dict[str, str] = {}
        self.words = ""
        self.before: dict[str, Callable[[], object]] = {}
        self.lost: set[str] = set()
        self.counter = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A model that is there already."""
        repo = self.repos[repo_id] = Repo(private)
        repo.branches["main"] = [Commit(self.new_oid(), {".gitattributes": b""}), Commit(self.new_oid(), files)]
        return repo

    def new_oid(self) -> str:
        self.counter += 1
        return hashlib.sha1(str(self.counter).encode()).hexdigest()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of a test's output."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunked()
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        for kind, method, pattern in KINDS:
            match = re.fullmatch(pattern, parts.path)
            if match and method == self.command:
                return self.answer(kind, {k: unquote(v) for k, v in match.groupdict().items() if v}, body)
        return self.send(404, {"error": f"no such call: {self.command} {parts.path}"})

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def chunked(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, kind: str, place: dict[str, str], body: bytes) -> None:
        hub = self.server
        hub.log.append(kind)
        if action := hub.before.pop(kind, None):
            action()
        status = hub.faults[kind].pop(0) if hub.faults[kind] else 0
        if status:
            return self.refuse(status, hub.words or "as the test asked")
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.token:
            hub.tokens.append(self.token)
        if self.token and self.token not in (TOKEN, READ_TOKEN):
            return self.refuse(401, "Invalid credentials in Authorization header")
        if "repo" in place and not self.visible(place["repo"]):
            return self.refuse(404 if self.token else 401, "Repository not found", "RepoNotFound")
        return getattr(self, f"on_{kind}")(place, body)

    def visible(self, repo_id: str) -> bool:
        repo = self.server.repos.get(repo_id)
        return repo is not None and (not repo.private or bool(self.token))

    def on_create(self, place: dict[str, str], body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or ME}/{asked['name']}"
        if not self.token:
            return self.refuse(401, "Invalid username or password.")
        if self.token == READ_TOKEN or repo_id.partition("/")[0] != ME:
            return self.refuse(403, "You don't have the rights to create a model under this namespace")
        if repo_id in self.server.repos:
            address = {"url": f"{self.server.url}/{repo_id}"}
            return self.send(409, {"error": "You already created this model repo", **address})
        repo = self.server.add(repo_id, {}, asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.branches["main"].pop()
        return self.send(200, {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": "1"})

    def on_whoami(self, place: dict[str, str], body: bytes) -> None:
        return self.send(200, {"type": "user", "name": ME, "auth": {}}) if self.token else self.refuse(401, "no token")

    def on_yaml(self, place: dict[str, str], body: bytes) -> None:
        content = json.loads(body)["content"]
        return self.send(200 if content.startswith("---\n") else 400, {"errors": [], "warnings": []})

    def on_preupload(self, place: dict[str, str], body: bytes) -> None:
        if (commits := self.commits(place)) is None:
            return None
        held = commits[-1].files
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            large = not path.endswith((".json", ".jsonl", ".md"))
            content = held.get(path)
            oid = None
            if content is not None:
                oid = hashlib.sha256(content).hexdigest() if large else git_oid(content)
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.send(200, {"files": answers})

    def on_batch(self, place: dict[str, str], body: bytes) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            address = f"{self.server.url}/lfs/{one['oid']}"
            actions = {"upload": {"href": f"{address}?signature=s3cr3t"}, "verify": {"href": f"{address}/verify"}}
            objects.append({**one} if one["oid"] in self.server.large else {**one, "actions": actions})
        return self.send(200, {"transfer": "basic", "objects": objects})

    def on_upload(self, place: dict[str, str], body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != place["oid"]:
            return self.refuse(400, "content does not match its hash")
        self.server.large[place["oid"]] = body
        return self.send(200, {})

    def on_verify(self, place: dict[str, str], body: bytes) -> None:
        return self.send(200 if place["oid"] in self.server.large else 404, {})

    def on_commit(self, place: dict[str, str], body: bytes) -> None:
        if (commits := self.commits(place)) is None:
            return None
        repo, hub = self.server.repos[place["repo"]], self.server
        wants_request = self.query.get("create_pr") == "1"
        if not wants_request and (self.token == READ_TOKEN or place["repo"].partition("/")[0] != ME):
            if not place["revision"].startswith("refs/pr/"):
                return self.refuse(403, "no write access")
        files, title = dict(commits[-1].files), ""
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
        commit = Commit(hub.new_oid(), files, title)
        answer = {"commitUrl": f"{hub.url}/{place['repo']}/commit/{commit.oid}", "commitOid": commit.oid}
        if wants_request:
            number = len(repo.requests) + 1
            repo.requests[number] = title
            repo.branches[f"refs/pr/{number}"] = [*commits, commit]
            answer["pullRequestUrl"] = f"{hub.url}/{place['repo']}/discussions/{number}"
        else:
            commits.append(commit)
        if "commit" in hub.lost:  # done, but the client never hears of it
            hub.lost.discard("commit")
            self.close_connection = True
            return self.connection.close()
        return self.send(200, answer)

    def on_branch(self, place: dict[str, str], body: bytes) -> None:
        repo = self.server.repos[place["repo"]]
        if place["revision"] in repo.branches:
            return self.refuse(409, "Reference already exists")
        repo.branches[place["revision"]] = list(repo.branches["main"])
        return self.send(200, {})

    def on_discussions(self, place: dict[str, str], body: bytes) -> None:
        found = [
            {
                "title": title,
                "num": number,
                "author": {"name": ME},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open",
                "repo": {"name": place["repo"], "type": "model"},
                "isPullRequest": True,
            }
            for number, title in self.server.repos[place["repo"]].requests.items()
        ]
        return self.send(200, {"count": len(found), "start": 0, "discussions": found})

    def on_info(self, place: dict[str, str], body: bytes) -> None:
        place = {"revision": "main", **place}
        if (commits := self.commits(place)) is None:
            return None
        names = [{"rfilename": name} for name in commits[-1].files]
        private = self.server.repos[place["repo"]].private
        about = {"id": place["repo"], "modelId": place["repo"], "sha": commits[-1].oid, "private": private}
        return self.send(200, {**about, "siblings": names, "tags": [], "downloads": 0})

    def on_tree(self, place: dict[str, str], body: bytes) -> None:
        if (commits := self.commits(place)) is None:
            return None
        files = commits[-1].files.items()
        return self.send(
            200, [{"type": "file", "path": name, "size": len(data), "oid": git_oid(data)} for name, data in files]
        )

    def on_xet(self, place: dict[str, str], body: bytes) -> None:
        return self.refuse(403, "no storage here")

    def on_file(self, place: dict[str, str], body: bytes) -> None:
        if (commits := self.commits(place)) is None:
            return None
        content = commits[-1].files.get(place["path"])
        if content is None:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commits[-1].oid, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return self.send(200, content, headers)

    def commits(self, place: dict[str, str]) -> list[Commit] | None:
        found = self.server.repos[place["repo"]].commits(place["revision"])
        if found is None:
            self.refuse(404, f"Invalid rev id: {place['revision']}", "RevisionNotFound")
        return found

    def refuse(self, status: int, words: str, code: str = "") -> None:
        headers = {"X-Error-Message": words, **({"X-Error-Code": code} if code else {})}
        self.send(status, {"error": words}, {**headers, **self.server.headers_of_faults})

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub for the length of the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
