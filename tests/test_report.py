"""The report claims no more than the numbers, escapes everything, and asks for nothing from a network."""

import dataclasses
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from comfy_browser import CHROMIUM
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_runs import look, new_run, record

from alignprop_pipe.images import to_pil
from alignprop_pipe.records import Change, Evidence
from alignprop_pipe.runs import drawings, pairs
from alignprop_pipe.runs.report import summary_sentences

NASTY = "<script>alert(\"x\")</script> & '$title ${command}' <img src=http://a.b/c onerror=x>"

BEYOND = """() => [...document.querySelectorAll("body *")]
    .filter(one => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1
        || one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflowX !== "visible")
    .map(one => one.tagName + " " + one.innerText.slice(0, 30))"""
NARROW = """() => [...document.querySelectorAll("td, th, p, h1, h2, h3, figcaption, span")]
    .filter(one => one.offsetParent && one.innerText.trim().length > 12 && one.getBoundingClientRect().width < 50)
    .map(one => one.tagName + " " + one.innerText.slice(0, 30))"""
"""Elements that go beyond the window or are cut; and those so narrow that words break letter by letter."""


class Page(HTMLParser):
    """Every tag and attribute of a page; complains where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def report_of(tmp_path, command: str = "alignprop train", changes=None, **kwargs) -> str:
    run = new_run(tmp_path / "run", **kwargs)
    run.about["command"] = command
    prompts = (NASTY, "一只狐狸 🦊", "x" * 400)
    run.evidence(dataclasses.replace(look(0), prompts=prompts), "before")
    run.append(record(1))
    run.evidence(dataclasses.replace(look(1), prompts=prompts), "after")
    run.adapter_path.write_bytes(b"")
    (run.path / "adapter-comfyui.safetensors").write_bytes(b"")
    return run.finish(changes or {"reward": (1.0, 1.5, 0.5, 0.1)}).read_text(encoding="utf-8")


# --- the page --------------------------------------------------------------------------------------------------------


def test_prompts_and_commands_are_shown_and_never_obeyed(tmp_path):
    text = report_of(tmp_path, command=f"alignprop train --prompt {NASTY}", reward=NASTY, prompts=NASTY)
    page = Page(text)
    assert not {tag for tag, _ in page.seen} & {"script", "b-b", "iframe", "object", "link"}
    assert not any(name.startswith("on") for _, attributes in page.seen for name in attributes)
    assert NASTY in "".join(page.text)
    assert "一只狐狸 🦊" in "".join(page.text)


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    text = report_of(tmp_path)
    addresses = [a[key] for _, a in Page(text).seen for key in ("src", "srcset", "href", "action") if key in a]
    assert len(addresses) == 2 + 2 * 3
    assert all(address is not None and address.startswith("data:image/") for address in addresses)
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text


def test_the_page_says_how_to_repeat_and_to_use(tmp_path):
    text = "".join(Page(report_of(tmp_path, command="alignprop train --seed 3")).text)
    for words in (
        "alignprop train --seed 3",
        "load_lora_weights",
        "Load LoRA",
        "resolve_model('emoji')",
        "learning rate",
    ):
        assert words in text


def test_a_run_without_pictures_or_adapter_has_a_page(tmp_path):
    run = new_run(tmp_path / "run")
    run.evidence(look(0, images=False), "before")
    run.append(record(1, reward=math.nan, loss=math.nan, skipped=True, seconds=math.nan, memory_mb=math.nan))
    run.evidence(look(1, images=False), "after")
    text = "".join(Page(run.finish().read_text(encoding="utf-8")).text)
    assert "No pictures were kept" in text
    assert "No adapter was saved" in text
    assert "nan" not in text.lower()
    assert not (run.path / "before-after.png").exists()


# --- the words -------------------------------------------------------------------------------------------------------


def test_the_warning_stands_on_the_page(tmp_path):
    text = report_of(tmp_path, changes={"reward": (1.0, 2.0, 1.0, 0.1), "emoji_judge": (0.6, 0.5, -0.1, 0.03)})
    assert 'role="alert"' in text
    assert 'role="alert"' not in report_of(tmp_path / "other")


def test_evidence_that_is_not_held_out_is_called_what_it_is(tmp_path):
    run = new_run(tmp_path / "run")
    for step, when in ((0, "before"), (1, "after")):
        run.evidence(dataclasses.replace(look(step), held_out=False), when)
    page = "".join(Page(run.finish({"reward": (1.0, 0.5, -0.5, 0.1)}).read_text(encoding="utf-8")).text)
    assert "Measured on 3 pictures of training prompts, fresh noise before and after." in page
    assert "held-out" not in page[: page.index("Settings")]


def test_a_curve_without_looks_is_not_said_to_show_some(tmp_path):
    run = new_run(tmp_path / "run")
    run.append(record(1))
    page = "".join(Page(run.finish().read_text(encoding="utf-8")).text)
    assert "Scores over the optimizer steps." in page
    assert "Dashed" not in page


def test_how_the_adapter_was_chosen_is_said(tmp_path):
    run = new_run(tmp_path / "run")
    run.evidence(look(0), "before")
    run.evidence(look(1), "after")
    page = run.finish({}, facts={"choice": "the adapter of step 1, the best of <2> looks"})
    assert "Kept: the adapter of step 1, the best of <2> looks." in "".join(Page(page.read_text(encoding="utf-8")).text)


def test_a_reward_that_fell_is_said_at_the_top(tmp_path):
    page = "".join(Page(report_of(tmp_path, changes={"reward": (1.0, 0.5, -0.5, 0.1)})).text)
    assert "The adapter is worse than the base model by the run's own evidence" in page[: page.index("The reward fell")]


def test_a_difference_within_its_error_is_no_claim():
    changes = {"reward": Change(1.0, 2.0, 1.0, 0.1), "emoji_judge": Change(0.5, 0.52, 0.02, 0.03)}
    text = " ".join(summary_sentences(look(0), look(1), changes))
    assert "The reward rose from 1 to 2 (+1 ± 0.1)." in text
    assert "from 0.5 to 0.52 (+0.02 ± 0.03, which may be chance)" in text


# --- the drawings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 60])
@pytest.mark.parametrize("looks", [[], [look(0)], [look(0), look(5, math.nan), look(9, math.inf), look(5)]])
def test_a_curve_of_any_length_is_drawn(tmp_path, steps, looks):
    records = [record(step, skipped=step % 7 == 0, distance=0.1 * step) for step in range(1, steps + 1)]
    records = [dataclasses.replace(r, reward=math.nan) if r.skipped else r for r in records]
    drawings.draw_curve(records, looks, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as curve:
        assert curve.width == 1500


def test_names_that_matplotlib_would_read_as_mathematics_are_drawn(tmp_path):
    strange = dataclasses.replace(look(0), judges={"a$b_{": 0.5, "_mine": 0.2, r"\frac{$": 0.1})
    drawings.draw_curve([record(1)], [strange], tmp_path / "curve.png")


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(1, 9))
def test_smoothing_stays_within_the_values(values, window):
    smooth = drawings.smoothed(values, window)
    assert len(smooth) == len(values)
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in smooth)
    assert drawings.smoothed([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]


def judged(*right: float, judge: str = "judge") -> Evidence:
    """An evaluation at as many prompts, each with what the judge says of its picture."""
    prompts = tuple(f"prompt {number}" for number in range(len(right)))
    scores = {"reward": tuple(0.1 * number for number in range(len(right))), judge: right}
    return dataclasses.replace(
        look(0, images=False), prompts=prompts, judges={judge: 0.5}, judge_names=(judge,), per_prompt=scores
    )


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=200))
def test_pairs_of_every_kind_are_shown(verdicts):
    before, after = (judged(*side) for side in zip(*verdicts, strict=True))
    shown = pairs.shown_pairs(before, after)
    assert len(set(shown)) == len(shown) == min(12, len(verdicts))
    for way, least in ((1, 8), (0, 2), (-1, 2)):
        kind = {number for number, (then, now) in enumerate(verdicts) if now - then == way}
        assert len(kind & {*shown}) >= min(least, len(kind))
        if len(verdicts) > 12:
            assert f"{len(kind)} {['stayed the same', 'became right', 'became wrong'][way]}" in pairs.caption(
                before, after
            )


@given(st.integers(1, 500))
def test_without_right_and_wrong_pairs_are_spread_over_the_list(count):
    values = judged(*(0.3 for _ in range(count)))
    chosen = pairs.shown_pairs(values, values)
    assert len(chosen) == min(count, 12)
    assert chosen[0] == 0
    gaps = {after - before for before, after in zip(chosen, [*chosen[1:], count], strict=True)}
    assert max(gaps) - min(gaps) <= 1


def test_a_picture_says_what_is_known_of_it():
    assert [pairs.is_right(judged(0.0, 1.0), number) for number in (0, 1, 2)] == [False, True, None]
    assert pairs.label(judged(0.0, 1.0), 1) == "0.1"  # the judge's word is the mark
    assert pairs.label(judged(0.25, 1.0), 1) == "0.1 · judge 1"
    assert pairs.is_right(judged(0.25, 1.0), 1) is None
    assert "the judge likes_dogs says" in pairs.caption(*[judged(0.0, 1.0, judge="likes_dogs")] * 2)


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (100, 300), (700, 512)])
def test_pairs_are_drawn_at_any_size(tmp_path, size):
    images = torch.rand(2, 3, *size, dtype=torch.float32)
    pair = dataclasses.replace(look(0), prompts=("", "word " * 200), images=images)
    drawings.draw_before_after(pair, pair, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert 400 <= sheet.width <= 1500
    with pytest.raises(ValueError, match="images"):
        drawings.draw_before_after(look(0, images=False), pair, tmp_path / "none.png")


def test_small_pictures_keep_their_pixels_in_the_sheet(tmp_path):
    images = torch.rand(1, 3, 64, 64)
    pair = dataclasses.replace(look(0), prompts=("a dog",), images=images)
    drawings.draw_before_after(pair, pair, tmp_path / "sheet.png")
    enlarged = to_pil(images[0]).resize((192, 192), Image.Resampling.NEAREST)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.crop((24, 24 + 24, 24 + 192, 24 + 24 + 192)).tobytes() == enlarged.tobytes()


@given(st.text(max_size=200), st.integers(1, 4))
def test_labels_stay_within_their_width(text, lines):
    rows = drawings._wrapped(text, drawings._font(), 200, lines)
    assert 1 <= len(rows) <= lines
    assert all(drawings._font().getlength(row) <= 200 for row in rows)


def test_a_picture_of_any_dtype_is_clamped_not_wrapped():
    image = torch.tensor([-1.0, 0.5, 2.0, math.nan], dtype=torch.bfloat16).expand(3, 1, 4)
    assert to_pil(image).tobytes() == bytes(v for v in (0, 128, 255, 0) for _ in range(3))


def test_on_a_phone_every_number_has_its_columns_name(tmp_path) -> None:
    report_of(tmp_path, changes={"reward": (1.0, 2.0, 1.0, 0.1)})
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    scores, *others = re.findall("<table>.*?</table>", page, flags=re.DOTALL)
    cells = re.findall("<td([^>]*)>", scores)
    assert len(cells) >= 7
    assert cells.count(' data-label="score"') == len(cells) / 7
    assert all('class="number"' in cell and "data-label" in cell for cell in cells[2:7])
    assert not any("data-label" in other for other in others)


def test_a_value_that_looks_like_a_template_stays_text(tmp_path) -> None:
    report_of(tmp_path, changes={"{{ 7 * 7 }}{% for %}": (1.0, 2.0, 1.0, 0.1)})
    assert "{{ 7 * 7 }}{% for %}" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.skipif(not CHROMIUM, reason="no chromium; CHROMIUM names one")
def test_in_a_browser_of_any_width_nothing_that_counts_is_cut(tmp_path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser")
    names = ["reward", *(f"judge_{i}(siglip, model=google/siglip-so400m-patch14-384)" for i in range(12))]
    report_of(tmp_path, changes=dict.fromkeys(names, (123456.789, -0.000123, 0.5, 0.1)))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (400, 800, 1600):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.goto((tmp_path / "run" / "report.html").as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert page.evaluate(BEYOND) == [], width
            assert page.evaluate(NARROW) == [], width
        browser.close()
