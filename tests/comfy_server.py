"""A real ComfyUI for the tests: its server on a free loopback port, our clone as one of its packs, and a client.

COMFYUI_PATH names the checkout, COMFYUI_PYTHON the Python that has its requirements (by default the one running here).
"""

import asyncio
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parent.parent
COMFYUI = os.environ.get("COMFYUI_PATH", "")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
PACK = "alignprop-pipe"  # the clone's folder, which is the pack's name for ComfyUI
FOLDERS = ("models/checkpoints", "models/loras", "custom_nodes", "input", "output", "temp", "user", "home", "site")
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")
NO_OUTSIDE = "http://127.0.0.1:9"  # the discard port: whoever asks the outside is refused at once

# ComfyUI must find the clone by itself, as a user's does, even where this package is installed for its Python; and
# modules can be missing there.
FORGET_THE_INSTALLED = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if one is PathFinder else one for one in sys.meta_path
                    if "__editable___alignprop_pipe" not in repr(one)]
sys.path[:] = [one for one in sys.path if one.rstrip("/") != {root!r}]
"""
SECRET = "hf_thisIsNoTokenButItLooksLikeOne0000"  # in the server's environment, and nowhere else

API = dict[str, Any]  # a graph as /prompt takes it: node id -> class_type and inputs


@dataclass(frozen=True)
class Event:
    """One message of the websocket; a preview picture is the kind "preview", its picture under "image"."""

    kind: str
    data: dict[str, Any]
    at: float


@dataclass(frozen=True)
class Run:
    """What the server told about one prompt, in order."""

    prompt_id: str
    events: list[Event]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event.data for event in self.events if event.kind == kind]

    @property
    def ended(self) -> str:
        """`execution_success`, `execution_error` or `execution_interrupted`; empty while it runs."""
        return next((event.kind for event in self.events if event.kind in ENDINGS), "")

    @property
    def error(self) -> str:
        """What the page shows of an error; empty without one."""
        return "".join(data["exception_message"] for data in self.of("execution_error"))

    @property
    def cached(self) -> set[str]:
        return {node for data in self.of("execution_cached") for node in data["nodes"]}

    @property
    def outputs(self) -> dict[str, dict[str, Any]]:
        return {data["node"]: data["output"] for data in self.of("executed")}

    @property
    def previews(self) -> list[Image.Image]:
        return [data["image"] for data in self.of("preview")]

    def progress(self, node: str) -> list[tuple[float, float]]:
        """Value and maximum of a node's bar, as it moved."""
        return [(data["value"], data["max"]) for data in self.of("progress") if data["node"] == node]


class Refused(Exception):
    """The server refused a graph; `answer` is its answer, with the errors of each node."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer))
        self.answer = answer


@dataclass
class Server:
    """A running ComfyUI."""

    base: Path
    port: int
    process: "subprocess.Popen[bytes]"
    clone: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.base / "log.txt").read_text(encoding="utf-8", errors="replace")

    def alive(self) -> bool:
        return self.process.poll() is None

    def get(self, route: str, **query: Any) -> bytes:
        return self._ask(route + ("?" + urllib.parse.urlencode(query) if query else ""), None)

    def json(self, route: str, **query: Any) -> Any:
        return json.loads(self.get(route, **query))

    def post(self, route: str, body: dict[str, Any]) -> bytes:
        return self._ask(route, json.dumps(body).encode())

    def object_info(self, node: str = "") -> dict[str, Any]:
        """What the page knows of every node, or of one; empty where there is no such node."""
        info = self.json(f"/object_info/{node}" if node else "/object_info")
        return info.get(node, {}) if node else info

    def history(self, prompt_id: str) -> dict[str, Any]:
        return self.json(f"/history/{prompt_id}").get(prompt_id, {})

    def interrupt(self, prompt_id: str = "") -> None:
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self) -> None:
        """Unload the models and forget the results of nodes, before the next prompt."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def view(self, shown: dict[str, str]) -> Image.Image:
        """A picture named by a node's output: file name, subfolder and type."""
        return Image.open(BytesIO(self.get("/view", **shown)))

    def _ask(self, route: str, body: bytes | None) -> bytes:
        request = urllib.request.Request(self.url + route, data=body, headers={"Content-Type": "application/json"})
        with OPENER.open(request, timeout=60) as answer:
            return answer.read()


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the machine is not for loopback


@dataclass
class Client:
    """A client with a websocket, as a page is one; what arrives is kept from the first message on."""

    server: Server
    client_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._news = threading.Condition()
        self._open = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()), daemon=True)

    def __enter__(self) -> "Client":
        self._thread.start()
        assert self._open.wait(30), "no websocket"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(30)

    async def _listen(self) -> None:
        import aiohttp  # pyright: ignore[reportMissingImports]  # comes with ComfyUI's requirements

        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        async with aiohttp.ClientSession() as session:
            url = f"{self.server.url}/ws?clientId={self.client_id}"
            async with session.ws_connect(url, max_msg_size=0) as socket_:
                await socket_.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
                self._open.set()
                reading = asyncio.ensure_future(self._read(socket_))
                await self._closing.wait()
                reading.cancel()

    async def _read(self, messages: Any) -> None:
        async for message in messages:
            event = understood(message.data)
            with self._news:
                self.events.append(event)
                self._news.notify_all()

    def post(self, prompt: API, workflow: dict[str, Any] | None = None, **extra: Any) -> str:
        """Queue a graph; `workflow` is the page's own form, which goes into the files of saved pictures.

        Raises:
            Refused: the server found the graph wrong before it ran.
        """
        body = {"prompt": prompt, "client_id": self.client_id, **extra}
        body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        try:
            answer = json.loads(self.server.post("/prompt", body))
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(json.loads(error.read())) from None
        return answer["prompt_id"]

    def follow(self, prompt_id: str, until: Callable[[Run], object] | None = None, seconds: float = 120) -> Run:
        """Wait until a prompt ends, or until `until` is true of what came so far; the run up to there."""
        reached, limit = until or (lambda run: run.ended), time.monotonic() + seconds
        with self._news:
            while not (reached(run := self.run_of(prompt_id)) or run.ended):
                assert self.server.alive(), f"ComfyUI stopped:\n{self.server.log[-3000:]}"
                kinds = [event.kind for event in run.events][-5:]
                assert time.monotonic() < limit, f"no end in {seconds} s; last {kinds}:\n{self.server.log[-3000:]}"
                self._news.wait(1)
        return run

    def run(self, prompt: API, workflow: dict[str, Any] | None = None, seconds: float = 120) -> Run:
        return self.follow(self.post(prompt, workflow), seconds=seconds)

    def run_of(self, prompt_id: str) -> Run:
        """Messages of one prompt; one without an id (old previews, texts) belongs to the prompt that is running."""
        mine, running = [], ""
        for event in self.events:
            running = event.data.get("prompt_id") or running
            if running == prompt_id and event.kind != "status":
                mine.append(event)
        return Run(prompt_id, mine)


def understood(raw: str | bytes) -> Event:
    """A message of the websocket: JSON, or bytes that begin with their kind."""
    now = time.monotonic()
    if isinstance(raw, str):
        message = json.loads(raw)
        return Event(message["type"], message["data"] or {}, now)
    kind, first = struct.unpack(">II", raw[:8])
    if kind == 3:
        return Event("text", {"node": raw[8 : 8 + first].decode(), "text": raw[8 + first :].decode()}, now)
    head = json.loads(raw[8 : 8 + first]) if kind == 4 else {}
    picture = raw[8 + first :] if kind == 4 else raw[8:]
    return Event("preview", {**head, "image": Image.open(BytesIO(picture))}, now)


def copy_as_cloned(target: Path) -> Path:
    """The repository as `git clone` would bring it, with what is not yet committed: no ignored file, no link."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:  # a copy of the tree without its history, as an archive brings it
        everywhere = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "work")
        at_the_root = {"build", "dist", "runs", "site"}  # alignprop_pipe has a folder `runs` of its own

        def ignored(folder: str, names: list[str]) -> set[str]:
            return everywhere(folder, names) | (at_the_root if Path(folder) == ROOT else set())

        return Path(shutil.copytree(ROOT, target, ignore=ignored))
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(base: Path, missing: tuple[str, ...]) -> dict[str, str]:
    """A home of its own, so that no cache or login of this machine is used, and no way out; code may be named."""
    script = FORGET_THE_INSTALLED.format(root=str(ROOT), missing=missing)
    (base / "site" / "sitecustomize.py").write_text(script, encoding="utf-8")
    ours = {"HF_TOKEN": SECRET, "HOME": str(base / "home"), "PYTHONPATH": str(base / "site"), "PYTHONUNBUFFERED": "1"}
    ours["ALIGNPROP_ALLOW_CODE"] = "1"  # rewards that fail on purpose are functions in files of the tests
    away = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), NO_OUTSIDE)
    dropped = ("HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, **away, **ours, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "1"}


def launch(base: Path, port: int, missing: tuple[str, ...]) -> "subprocess.Popen[bytes]":
    command = [PYTHON, str(Path(COMFYUI) / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += [
        "--base-directory",
        str(base),
        "--database-url",
        f"sqlite:///{base}/user/comfyui.db",
        "--disable-api-nodes",
    ]
    with (base / "log.txt").open("wb") as log:
        return subprocess.Popen(command, cwd=base, env=environment(base, missing), stdout=log, stderr=subprocess.STDOUT)


def wait_until_ready(server: Server, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while True:
        assert server.alive(), f"ComfyUI stopped at its start:\n{server.log[-5000:]}"
        assert time.monotonic() < limit, f"ComfyUI is not ready after {seconds} s:\n{server.log[-5000:]}"
        try:
            server.get("/system_stats")
            return
        except OSError:
            time.sleep(0.2)


@contextmanager
def running(base: Path, missing: tuple[str, ...] = ()) -> Iterator[Server]:
    """ComfyUI in `base`, with our clone in its `custom_nodes`; stopped at the end. Modules can be `missing` there."""
    for name in FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)
    clone, port = copy_as_cloned(base / "custom_nodes" / PACK), free_port()
    server = Server(base, port, launch(base, port, missing), clone)
    try:
        wait_until_ready(server)
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(20)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()


WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
MUTED, BYPASSED = 2, 4


def as_prompt(workflow: dict[str, Any], info: dict[str, Any]) -> API:
    """A workflow as the page saves it, as the graph that /prompt takes; without subgraphs and bypassed nodes."""
    assert all(node.get("mode") != BYPASSED for node in workflow["nodes"]), "bypass is the page's own work"
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    alive = [node for node in workflow["nodes"] if node.get("mode") != MUTED and node["type"] in info]
    present = {str(node["id"]) for node in alive}
    graph = {}
    for node in alive:
        given = dict(widget_values(node, info[node["type"]]))
        sockets = {one["name"]: links.get(one.get("link")) for one in node.get("inputs", [])}
        given.update({name: link for name, link in sockets.items() if link and link[0] in present})
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": given}
    return graph


def widget_values(node: dict[str, Any], info: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name and value of each widget; a number that can be drawn anew holds a second place, for how it changes."""
    values = iter(node.get("widgets_values", []))
    for name in [one for part in ("required", "optional") for one in info["input_order"].get(part, [])]:
        kind, *options = info["input"].get("required", {}).get(name) or info["input"]["optional"][name]
        settings = options[0] if options else {}
        if settings.get("forceInput") or not (isinstance(kind, list) or kind in WIDGETS):
            continue
        try:
            yield name, next(values)
        except StopIteration:
            return
        if settings.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed")):
            next(values, None)
