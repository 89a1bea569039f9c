"""The help pages of the nodes: one for each, which speaks of everything on it, with the figures of the package."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignprop_pipe.config.settings import PRESETS
from alignprop_pipe.rewards.entries import RewardEntry
from alignprop_pipe.rewards.registry import REGISTRY, parse_reward
from comfy_nodes.widgets import reward_names, reward_parameters, setting_widgets

NODES = Path(__file__).parent.parent / "comfy_nodes"
DOCS = NODES / "web" / "docs"


def nodes() -> Iterator[tuple[str, str]]:
    """Id and source of each node."""
    for path in sorted(NODES.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for kind in ast.parse(text).body:
            source = ast.get_source_segment(text, kind) or ""
            if isinstance(kind, ast.ClassDef) and (found := re.search(r'node_id="(\w+)"', source)):
                yield found[1], source


SOURCES = dict(nodes())


def page(node: str) -> str:
    return (DOCS / f"{node}.md").read_text(encoding="utf-8")


def cells(text: str) -> list[list[str]]:
    """The rows of all tables."""
    rows = (line.strip().strip("|") for line in text.splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for row in rows]


def reward_row(entry: RewardEntry) -> str:
    """A reward's line of the table, by the registry."""
    size = f"{entry.size_mb / 1000:.1f} GB" if entry.size_mb >= 1000 else f"{entry.size_mb:.0f} MB"
    download = size if entry.weights else "comes along" if entry.bundled else "none"
    texts = (entry.name, entry.summary, entry.range_text, download, entry.licence)
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def test_every_node_has_a_page_and_every_page_its_node() -> None:
    assert len(SOURCES) == 13
    assert {path.stem for path in DOCS.iterdir()} == set(SOURCES)


@pytest.mark.parametrize("node", SOURCES)
def test_a_page_begins_with_the_name_on_the_node_and_has_an_example_and_ways_out(node: str) -> None:
    title = re.search(r'display_name="([^"]+)"', SOURCES[node])
    assert title is not None
    text = page(node)
    assert text.startswith(f"# {title[1]}\n\n")
    assert re.search(r"^## Examples?$", text, re.MULTILINE)
    assert "\n## What goes wrong\n" in text
    assert not re.search(r"!\[|<\w+>|https?://", text), "plain words: no picture, tag or address"
    assert {len(row) for row in cells(text)} <= {2, 3, 5}


@pytest.mark.parametrize("node", SOURCES)
def test_a_page_speaks_of_every_input_and_output(node: str) -> None:
    source, text = SOURCES[node], page(node)
    inputs = re.findall(r'(?:Input|_whole)\(\s*f?"(\w+?)(?:_\{number\})?"', source)
    inputs += ["seed"] * ("seed_input" in source) + [widget.name for widget in setting_widgets()] * (
        "_settings()" in source
    )
    outputs = re.findall(r'Output\(\s*display_name="(\w+)"', source)
    assert inputs
    assert outputs
    assert [name for name in (*inputs, *outputs) if not re.search(rf"`{name}(_1)?`", text)] == []


def test_the_page_of_align_has_every_setting_with_its_default() -> None:
    told = {row[0]: row[1] for row in cells(page("AlignPropAlign")) if len(row) == 3}
    for widget in setting_widgets():
        blank = ("alpha", "max_grad_growth", "height", "width")
        shown = {"": "empty", 0.0: "`0`"}.get(widget.default) if widget.name in blank else None
        default = shown or (f"`{widget.default}`" if widget.default != "" else "empty")
        assert told.get(f"`{widget.name}`") == default, widget.name
    assert all(f"`{preset}`" in page("AlignPropAlign") for preset in PRESETS)


def test_the_page_of_reward_has_the_registry_s_facts() -> None:
    head = "| reward | what it measures | range | download | licence |\n|---|---|---|---|---|\n"
    table = head + "\n".join(reward_row(REGISTRY[name]) for name in reward_names()) + "\n"
    assert table in page("AlignPropReward"), f"the table under 'Every reward' has to be\n\n{table}"
    for row in table.splitlines()[2:]:
        assert all(cell for cell in cells(row)[0])


def test_the_page_of_reward_has_the_widgets_that_many_rewards_have() -> None:
    named = [widget.name for name in reward_names() for widget in reward_parameters(name)]
    many = {name for name in named if named.count(name) > 4}
    assert many == {"model", "revision", "dtype", "offload"}
    assert all(f"\n| `{name}` |" in page("AlignPropReward") for name in many)


def test_names_that_a_page_tells_to_write_are_those_of_rewards() -> None:
    chosen = page("AlignPropReward").partition("## Which one")[2].partition("Several at once")[0]
    assert all(f"`{name}`" in chosen for name in reward_names() if name not in ("hpsv2", "aesthetic2.5"))


def test_the_expressions_on_the_page_of_reward_from_text_are_rewards() -> None:
    examples = [row[0].strip("`") for row in cells(page("AlignPropRewardText")) if row[0].startswith("`")]
    examples = [
        text for text in examples if text not in ("expression", "accept_license", "reward") and ".py:" not in text
    ]
    assert len(examples) > 6
    for text in examples:
        parse_reward(text)


def test_the_documentation_lists_the_nodes_and_the_templates() -> None:
    told = cells((NODES.parent / "docs" / "comfyui.md").read_text(encoding="utf-8"))
    titles = [re.findall(r'display_name="([^"]+) \(AlignProp\)"', source)[0] for source in SOURCES.values()]
    templates = [f"`{path.stem}`" for path in (NODES.parent / "example_workflows").glob("*.json")]
    names = [row[0] for row in told if row[0] not in ("node", "template", "---")]
    assert sorted(names) == sorted([*titles, *templates])
