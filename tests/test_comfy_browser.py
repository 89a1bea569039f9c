"""ComfyUI's page with our nodes, in a real browser; run as tests/test_comfy.py is.

ALIGNPROP_SCREENSHOTS names a folder that keeps the screenshots.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy_browser
import comfy_server
import pytest
from comfy_browser import CHROMIUM, Page
from comfy_server import COMFYUI, PACK, ROOT, Server

pytest.importorskip("playwright", reason="drives the browser")
pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH names no ComfyUI"),
    pytest.mark.skipif(not CHROMIUM, reason="no chromium; CHROMIUM names one"),
]

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
FIRST = "align-emoji"
FEW = {
    "steps": 4,
    "batch_size": 4,
    "num_inference_steps": 5,
    "eval_prompts": 4,
    "eval_every": 1,
    "truncation": "last:1",
}
CURVE = "id => app.graph.getNodeById(id).alignpropRun.points.length"
CURVE_DRAWN = "id => app.graph.getNodeById(id).widgets.find(one => one.name === 'curve').element.toDataURL()"
LISTED = "id => app.graph.getNodeById(id).widgets.find(one => one.name === 'lora_name').options.values"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with comfy_server.running(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture(scope="module")
def shared(server: Server) -> Iterator[Page]:
    with comfy_browser.opened(server) as page:
        yield page


@pytest.fixture
def page(shared: Page) -> Iterator[Page]:
    """An empty page, and nothing in its console when the test is over."""
    shared.dismiss()
    shared.clear()
    shared.complaints.clear()
    yield shared
    assert shared.complaints == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("ALIGNPROP_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def graph_with_few_steps(page: Page, **more: Any) -> dict[str, Any]:
    """The first example with few steps; its Align node."""
    page.load(json.loads((ROOT / "example_workflows" / f"{FIRST}.json").read_text(encoding="utf-8")))
    node = page.node("AlignPropAlign")
    page.set(node["id"], **{**FEW, **more})
    return node


def test_the_first_example_runs_at_a_press_and_is_seen_to(page: Page, pictures: Path) -> None:
    page.open_template(PACK, FIRST)
    assert page.alerts() == []
    node = page.node("AlignPropAlign")
    page.set(node["id"], **FEW)
    empty = page.page.evaluate(CURVE_DRAWN, node["id"])
    page.press_run()
    page.wait_for("id => app.nodePreviewImages?.[id]?.length", str(node["id"]))
    first = page.previews(node["id"])
    page.wait_for(f"id => ({CURVE})(id) >= 3", node["id"])
    page.screenshot(pictures / "running.png")
    assert 0 < page.node("AlignPropAlign")["progress"] < 1
    assert page.previews(node["id"]) not in ([], first)
    assert page.page.evaluate(CURVE_DRAWN, node["id"]) != empty
    assert page.wait_until_done(300) == "execution_success", page.alerts()
    page.page.wait_for_timeout(1500)  # the last pictures come in
    page.screenshot(pictures / "done.png")
    bar = [detail["value"] for detail in page.events("progress") if str(detail["node"]) == str(node["id"])]
    assert bar == sorted(bar)
    assert page.page.evaluate(CURVE, node["id"]) == FEW["steps"] + 1
    assert "held-out reward" in page.node("AlignPropAlign")["widgets"]["result"]
    assert page.alerts() == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_example_opens_without_a_complaint(page: Page, pictures: Path, path: Path) -> None:
    page.open_template(PACK, path.stem)
    page.screenshot(pictures / f"{path.stem}.png")
    assert page.alerts() == []
    assert [node["type"] for node in page.nodes() if not node["known"]] == []
    saved = json.loads(path.read_text(encoding="utf-8"))
    links = {link[0] for link in saved["links"]}
    opened = page.as_workflow()
    assert {link[0] for link in opened["links"]} == links
    assert boxes_that_overlap(opened) == []


def boxes_that_overlap(workflow: dict[str, Any]) -> list[tuple[str, str]]:
    """Nodes that lie on each other, with their titles above them."""
    found, boxes = [], []
    for node in workflow["nodes"]:
        (x, y), (width, height) = list(node["pos"])[:2], list(node["size"])[:2]
        box = (x, y - 30, x + width, y + height)
        for name, (left, top, right, bottom) in boxes:
            if box[0] < right and left < box[2] and box[1] < bottom and top < box[3]:
                found.append((name, node["type"]))
        boxes.append((node["type"], box))
    return found


def test_the_rewards_widgets_follow_the_choice_and_are_saved(page: Page) -> None:
    id_ = page.add("AlignPropReward")
    page.set(id_, reward="jpeg")
    assert "quality" in page.node("AlignPropReward")["widgets"]
    page.set(id_, quality=60)
    page.set(id_, reward="clip")
    assert "quality" not in page.node("AlignPropReward")["widgets"]
    page.set(id_, reward="jpeg")
    page.set(id_, quality=60)
    saved = page.as_workflow()
    page.load(saved)
    assert page.node("AlignPropReward")["widgets"]["quality"] == 60
    (part,) = page.as_prompt().values()
    assert json.loads(part["inputs"]["parameters"]) == {"quality": 60}
    assert set(part["inputs"]) == {"reward", "parameters", "accept_license"}


def test_links_join_what_fits_and_refuse_the_rest(page: Page) -> None:
    pipe, reward, align = page.add("AlignPropLoadPipeline"), page.add("AlignPropReward"), page.add("AlignPropAlign")
    core = page.add("CheckpointLoaderSimple")
    assert page.link(pipe, "pipe", align, "pipe")
    assert page.link(reward, "reward", align, "reward")
    assert not page.link(reward, "reward", align, "prompts")
    assert not page.link(core, "MODEL", align, "pipe")
    shown = page.add("PreviewImage")
    assert page.link(align, "curve", shown, "images")
    assert not page.link(align, "adapter", shown, "images")


def test_a_combination_grows_a_socket_and_lives_with_a_muted_reward(page: Page) -> None:
    both = page.add("AlignPropCombineRewards", 600, 0)
    page.page.wait_for_timeout(200)
    assert sockets(page) == ["reward_1", "reward_2"]
    rewards = [page.add("AlignPropReward", 0, 200 * place) for place in range(3)]
    for number, reward in enumerate(rewards, 1):
        assert page.link(reward, "reward", both, f"reward_{number}")
        page.page.wait_for_timeout(200)
    assert sockets(page) == ["reward_1", "reward_2", "reward_3", "reward_4"]
    page.page.evaluate("id => { app.graph.getNodeById(id).mode = 2; }", rewards[1])
    given = page.as_prompt()[str(both)]["inputs"]
    assert {"reward_1", "reward_3"} <= set(given)
    assert "reward_2" not in given
    page.load(page.as_workflow())
    page.page.wait_for_timeout(200)
    assert sockets(page) == ["reward_1", "reward_2", "reward_3", "reward_4"]


def sockets(page: Page) -> list[str]:
    names = [name for name, type_, _ in page.node("AlignPropCombineRewards")["inputs"] if type_ == "ALIGNPROP_REWARD"]
    return sorted(names)


def test_a_preset_fills_in_the_settings(page: Page) -> None:
    from alignprop_pipe.config.settings import AlignConfig

    id_ = page.add("AlignPropAlign")
    page.set(id_, **{"settings of": "emoji"})
    preset = AlignConfig.preset("emoji")
    widgets = page.node("AlignPropAlign")["widgets"]
    assert (widgets["steps"], widgets["rank"]) == (preset.steps, preset.lora.rank)
    given = page.as_prompt()[str(id_)]["inputs"]
    assert given["lr"] == pytest.approx(preset.optimizer.lr)
    assert not {"settings of", "curve", "result"} & set(given)


def test_a_seed_stays_as_it_is(page: Page) -> None:
    page.add("AlignPropAlign")
    assert page.node("AlignPropAlign")["widgets"]["control_after_generate"] == "fixed"


def test_the_nodes_are_found_by_search(shared: Page, pictures: Path) -> None:
    page = shared  # its console is not ours: the core's search box stumbles over itself
    page.page.mouse.dblclick(800, 500)
    page.page.keyboard.type("alignprop")
    options = page.page.locator(".p-autocomplete-option")
    options.first.wait_for()
    page.screenshot(pictures / "search.png")
    found = " ".join(options.all_inner_texts())
    assert "Align (AlignProp)" in found
    page.page.keyboard.press("Escape")


def test_a_wrong_value_marks_its_node_and_says_why(shared: Page, pictures: Path) -> None:
    node = graph_with_few_steps(shared, truncation="lsat:5")
    shared.press_run()
    shared.page.locator(".p-dialog").first.wait_for()
    shared.screenshot(pictures / "refused.png")
    assert "lsat" in "".join(shared.alerts())
    assert next(one for one in shared.nodes() if one["id"] == node["id"])["errors"]


def test_stop_and_refresh_show_the_stopped_lora(page: Page, pictures: Path) -> None:
    node = graph_with_few_steps(page, steps=500, seed=11)
    page.press_run()
    page.wait_for(f"id => ({CURVE})(id) >= 3", node["id"])
    page.page.evaluate("() => { app.extensionManager.command.execute('Comfy.Interrupt'); }")
    assert page.wait_until_done() == "execution_interrupted"
    page.clear()
    loader = page.add("LoraLoaderModelOnly")
    page.page.mouse.click(800, 700)
    page.page.keyboard.press("r")
    page.wait_for(f"id => ({LISTED})(id).some(one => one.includes('stopped'))", loader, seconds=15)
