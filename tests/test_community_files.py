"""What stands beside the code agrees with it: version, changelog, citation, licence, pinned tools."""

import re
from pathlib import Path

import yaml

import alignprop_pipe

ROOT = Path(__file__).parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_has_the_version_and_names_the_paper() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == alignprop_pipe.__version__
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Prabhudesai", "Goyal", "Pathak", "Fragkiadaki"]
    assert "2310.03739" in paper["url"]


def test_the_changelog_speaks_of_this_version() -> None:
    assert re.search(rf"\b{re.escape(alignprop_pipe.__version__)}\b", read("CHANGELOG.md"))


def test_the_licence_is_whole() -> None:
    text = read("LICENSE")
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_dependency_is_pinned_in_the_constraints_without_a_source() -> None:
    pins = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; python_version (<|>=) '3\.11')?", pin) for pin in pins)
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    project = read("pyproject.toml")
    start = project.index("dependencies = [")
    required = re.findall(r'^  "([\w-]+)[><=]', project[start : project.index("]", start)], re.MULTILINE)
    assert len(required) > 10
    assert {name.lower().replace("_", "-") for name in required} <= pinned
    extras = re.findall(r'"([\w-]+)(?:\[\w+\])?[><=]', project[project.index("\ndocs = [") :].split("]\n")[0])
    assert {"mkdocs-material", "mkdocstrings"} <= set(extras) <= pinned
    tools = dict(re.findall(r'"(ruff|pyright)(?:\[nodejs\])?==([\d.]+)"', project))
    assert {f"{name}=={version}" for name, version in tools.items()} <= set(pins)
    assert f'required-version = "=={tools["ruff"]}"' in project


def test_ci_does_the_two_commands_of_the_readme() -> None:
    script = read(".ci/run")
    for command in ("pip install -c constraints.txt . && alignprop train", "-e '.[test]' && pytest", "ruff check ."):
        assert command in script
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
