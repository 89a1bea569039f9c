"""The public names and their signatures, against the list in `public_api.txt`: a change there is a decision."""

import ast
import difflib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jedi
import pytest

import alignprop_pipe

STORED = Path(__file__).with_name("public_api.txt")


def signature(name: str, value: Any) -> str:
    """The name with its arguments and defaults; without annotations, which Python's versions print differently."""
    try:
        found = inspect.signature(value)
    except ValueError:  # an exception that takes what every exception takes
        return f"{name}(*args)"
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return name + re.sub(r"<(object object|function [^ ]+|factory)( at 0x[0-9a-f]+)?>", "...", text)


def described(name: str) -> list[str]:
    """One line for a name, and one for each public method or property that its class defines itself."""
    value = getattr(alignprop_pipe, name)
    if isinstance(value, ModuleType):
        return [f"{name}: module", *sorted(f"{name}.{one}" for one in public_names(value))]
    if not inspect.isclass(value):
        return [signature(name, value)] if callable(value) else [name]
    lines = [f"class {signature(name, value)}"]
    for key, member in sorted(vars(value).items()):
        if key.startswith("_") or inspect.ismemberdescriptor(member):
            continue
        if isinstance(member, property):
            lines.append(f"{name}.{key}: property")
        elif callable(getattr(value, key)):
            lines.append(signature(f"{name}.{key}", getattr(value, key)))
    return lines


def public_names(module: ModuleType) -> list[str]:
    return [
        name
        for name in getattr(module, "__all__", vars(module))
        if not name.startswith("_") and not isinstance(getattr(module, name), ModuleType)
    ]


def test_public_names_and_signatures_are_those_of_the_list(tmp_path: Path) -> None:
    found = [line for name in sorted(alignprop_pipe.__all__) for line in described(name)]
    stored = STORED.read_text(encoding="utf-8").splitlines() if STORED.exists() else []
    new = tmp_path / STORED.name
    new.write_text("\n".join(found) + "\n", encoding="utf-8")
    changes = "\n".join(difflib.unified_diff(stored, found, "tests/public_api.txt", "now", lineterm="", n=0))
    assert found == stored, f"{changes}\nIf this is meant: cp {new} {STORED}, and a line in CHANGELOG.md"


def test_every_name_is_listed_once_and_seen_by_type_checkers() -> None:
    tree = ast.parse(Path(alignprop_pipe.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == alignprop_pipe._HOME
    assert len(set(alignprop_pipe.__all__)) == len(alignprop_pipe.__all__)
    assert set(alignprop_pipe.__all__) <= set(dir(alignprop_pipe))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'alignprop_pipe' has no attribute 'AlignPipeline'"):
        getattr(alignprop_pipe, "AlignPipeline")  # noqa: B009 - a type checker would see the plain form


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("pipe.", {"align", "save_adapter", "load_lora_weights", "set_adapters", "to", "components", "unet", "vae"}),
        ('pipe("a fox").', {"images", "frames"}),
        ('pipe("a fox").images[0].', {"save", "resize"}),
        ('pipe.align("clip", ["a fox"]).', {"adapter", "history"}),
    ],
)
@pytest.mark.parametrize("made", ['from_pretrained("a/model")', "from_pipe(None)", 'from_single_file("a.safetensors")'])
def test_an_editor_completes_what_a_pipeline_and_its_pictures_have(made: str, code: str, names: set[str]) -> None:
    script = f"from alignprop_pipe import AlignPropPipeline\npipe = AlignPropPipeline.{made}\n{code}"
    project = jedi.Project(Path(alignprop_pipe.__file__).parents[1])
    assert names <= {one.name for one in jedi.Script(script, project=project).complete()}
