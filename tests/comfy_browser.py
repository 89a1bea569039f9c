"""ComfyUI's own page in a real browser (Debian's chromium, without a window, driven by Playwright).

CHROMIUM names the program where it is not on the path. On the classic canvas nodes are pixels: what a node holds is
read from the page's graph, `window.app.graph`, and only buttons and menus are clicked.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_server import ENDINGS, Server

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome") or ""

# A user who has been here before: no welcome dialog over the canvas, no small map in the picture.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}

IS_READY = """() => window.app?.graph && window.app.vueAppReady && app.extensionManager.workflow?.activeWorkflow
    && document.querySelector("[data-testid=queue-button]")"""

# The core asks at its start for files that a new user has not, for templates of its own, and for its makers' site.
OF_THE_CORE = ("/userdata", "/user.css", "/favicon.ico", "/templates/", "core workflow templates", "api.comfy.org")

KEEP_EVENTS = """kinds => {
    window.seenEvents = [];
    for (const kind of kinds)
        app.api.addEventListener(kind, event => window.seenEvents.push([kind, event.detail ?? {}]));
}"""

NODES = """() => app.graph._nodes.map(node => ({
    id: node.id, type: node.type, title: node.title, mode: node.mode,
    errors: Boolean(node.has_errors || app.lastNodeErrors?.[node.id] || app.lastExecutionError?.node_id == node.id),
    known: node.type in LiteGraph.registered_node_types, progress: node.progress ?? null, size: [...node.size],
    widgets: Object.fromEntries((node.widgets ?? []).map(one => [one.name, one.value])),
    inputs: (node.inputs ?? []).map(one => [one.name, one.type, one.link ?? null]),
    outputs: (node.outputs ?? []).map(one => [one.name, one.type, one.links ?? []]),
}))"""

PREVIEWS = """id => {
    const picture = app.nodePreviewImages?.[id] ?? [];
    return Array.isArray(picture) ? picture : [picture];
}"""

SET_WIDGET = """([id, name, value]) => {
    const node = app.graph.getNodeById(id), widget = node.widgets.find(one => one.name === name);
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
}"""

LINK = """([from, output, to, input]) => {
    const source = app.graph.getNodeById(from), target = app.graph.getNodeById(to);
    const link = source.connect(source.findOutputSlot(output), target, target.findInputSlot(input));
    return Boolean(link);
}"""


@dataclass
class Page:
    """The page, once it is ready; `complaints` are its console's warnings and errors that are ours to answer for."""

    page: Any
    server: Server
    complaints: list[str] = field(default_factory=list)
    ready: bool = False

    def open(self) -> None:
        self.page.on("console", lambda one: self._heard(one.type, f"{one.text} {one.location.get('url', '')}"))
        self.page.on("pageerror", lambda error: self._heard("error", str(error.stack or error)))
        self.page.goto(self.server.url)
        self.page.wait_for_function(IS_READY, timeout=60_000)
        self.page.wait_for_load_state("networkidle")
        self.page.evaluate(KEEP_EVENTS, ["progress", "progress_state", "executing", "executed", *ENDINGS])
        self.ready = True

    def _heard(self, kind: str, text: str) -> None:
        """Keep it if it is ours: whatever names us, and once the page is ready all but the core's known ones."""
        ours = "alignprop" in text.lower() or (self.ready and not any(one in text for one in OF_THE_CORE))
        if kind in ("error", "warning") and ours:
            self.complaints.append(f"{kind}: {text}")

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow, as when its file is dropped on the page, and show all of it."""
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.fit()

    def open_template(self, pack: str, name: str) -> None:
        """Open a pack's example as a user does: Browse Templates, the pack's name, the card."""
        self.page.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates'); }")
        self.page.locator(".p-dialog").get_by_text(pack, exact=True).first.click()
        self.page.locator(f'[data-testid="template-workflow-{name}"]').first.click()
        self.page.locator(f'[data-testid="template-workflow-{name}"]').wait_for(state="detached")
        self.page.wait_for_function("() => app.graph._nodes.length > 0")
        self.fit()

    def fit(self) -> None:
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(600)  # the view glides

    def nodes(self, type_: str = "") -> list[dict[str, Any]]:
        """Each node: id, type, widgets by name, inputs and outputs (name, type, links), progress, whether it is red."""
        return [node for node in self.page.evaluate(NODES) if type_ in ("", node["type"])]

    def node(self, type_: str) -> dict[str, Any]:
        (one,) = self.nodes(type_)
        return one

    def set(self, id_: int, **widgets: Any) -> None:
        for name, value in widgets.items():
            self.page.evaluate(SET_WIDGET, [id_, name, value])

    def clear(self) -> None:
        """An empty canvas; the page starts with the core's default workflow."""
        self.page.evaluate("() => { app.clean(); app.graph.clear(); }")

    def add(self, type_: str, x: float = 0, y: float = 0) -> int:
        script = (
            "([type, x, y]) => { const n = LiteGraph.createNode(type); n.pos = [x, y]; app.graph.add(n); return n.id; }"
        )
        return self.page.evaluate(script, [type_, x, y])

    def link(self, source: int, output: str, target: int, input_: str) -> bool:
        """Draw a link; false where the page refuses it, as for sockets of different types."""
        return self.page.evaluate(LINK, [source, output, target, input_])

    def as_prompt(self) -> dict[str, Any]:
        """The graph as the page would post it, with muted and bypassed nodes resolved."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def as_workflow(self) -> dict[str, Any]:
        """The graph as the page would save it."""
        return json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def press_run(self) -> None:
        self.page.evaluate("() => { window.seenEvents.length = 0; }")
        # The button itself since frontend 1.49, a button inside before.
        self.page.locator("[data-testid=queue-button]").locator("xpath=descendant-or-self::button").first.click()

    def events(self, kind: str = "") -> list[Any]:
        """What the page heard since Run was pressed: of one kind the details, else pairs."""
        seen = self.page.evaluate("() => window.seenEvents")
        return [detail for one, detail in seen if one == kind] if kind else seen

    def wait_for(self, script: str, argument: Any = None, seconds: float = 120) -> Any:
        """Wait until a function of the page gives something true; that thing."""
        return self.page.wait_for_function(script, arg=argument, timeout=seconds * 1000, polling=100).json_value()

    def wait_until_done(self, seconds: float = 120) -> str:
        """How the run ended: one of `comfy_server.ENDINGS`."""
        ended = "kinds => window.seenEvents.map(one => one[0]).find(kind => kinds.includes(kind))"
        return self.wait_for(ended, list(ENDINGS), seconds)

    def previews(self, id_: int) -> list[str]:
        """Addresses of the pictures that a running node shows; a new picture has a new address."""
        return self.page.evaluate(PREVIEWS, str(id_))

    def alerts(self) -> list[str]:
        """What the page says to the user in boxes over the canvas: warnings of a workflow, errors of a run."""
        return self.page.locator(".p-toast-message, .p-dialog:visible").all_inner_texts()

    def dismiss(self) -> None:
        """Close such boxes."""
        self.page.keyboard.press("Escape")
        self.page.evaluate("() => document.querySelectorAll('.p-toast-close-button').forEach(one => one.click())")
        self.page.wait_for_function("() => !document.querySelector('.p-toast-message')")

    def screenshot(self, path: Path) -> Path:
        self.page.screenshot(path=str(path))
        return path


def remember_the_user(server_base: Path) -> None:
    folder = server_base / "user" / "default"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")


@contextmanager
def opened(server: Server, width: int = 1600, height: int = 1000) -> Iterator[Page]:
    """The page of a running server; read the settings of the user afresh, so the server may be in use already."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]  # only for these tests

    remember_the_user(server.base)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = Page(browser.new_page(viewport={"width": width, "height": height}), server)
            page.open()
            yield page
        finally:
            browser.close()
