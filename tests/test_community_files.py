"""What stands next to the code agrees with it: version, changelog, citation, licence, pinned tools."""

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


# --- the workflows --------------------------------------------------------------------------------------------------

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps_of(workflow: Path) -> list[dict]:
    """All steps of all jobs."""
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_the_workflows_do_what_ci_does() -> None:
    runs = [step["run"] for step in steps_of(ROOT / ".github/workflows/tests.yml") if "run" in step]
    script = read(".ci/run")
    for command in ("ruff check .", "ruff format --check .", "pyright", "pytest"):
        assert command in runs
        assert command in script
    for extra in ("dev", "test"):
        assert f"pip install -c constraints.txt -e '.[{extra}]'" in runs
        assert f"pip install -c constraints.txt -e '.[{extra}]'" in script or extra == "dev"


def test_the_workflows_test_every_python_that_is_promised() -> None:
    jobs = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]
    tested = jobs["tests"]["strategy"]["matrix"]["python-version"]
    promised = re.findall(r"Programming Language :: Python :: (3\.\d+)", read("pyproject.toml"))
    assert tested == promised
    assert f'requires-python = ">={tested[0]}"' in read("pyproject.toml")


def test_actions_have_versions_and_workflows_few_rights() -> None:
    assert len(WORKFLOWS) == 3
    for workflow in WORKFLOWS:
        uses = [step["uses"] for step in steps_of(workflow) if "uses" in step]
        assert uses
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", action) for action in uses)
        assert yaml.safe_load(workflow.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}


def test_the_pinned_torch_is_that_of_the_workflows() -> None:
    (torch,) = re.findall(r"^torch==[\d.]+", read("constraints.txt"), re.MULTILINE)
    for workflow in WORKFLOWS:
        said = [step["run"] for step in steps_of(workflow) if "torch==" in step.get("run", "")]
        assert said
        assert all(torch in command for command in said)


def test_the_form_for_faults_asks_for_the_doctor() -> None:
    forms = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("[bf]*.yml")]
    assert len(forms) == 2
    assert all(form["name"] and form["description"] and form["body"] for form in forms)
    assert any(
        field.get("id") == "doctor" and field["validations"]["required"] for form in forms for field in form["body"]
    )
    assert "Report a vulnerability" in read("SECURITY.md")
