"""The examples in docstrings: they run, and everything public has one."""

import doctest
import inspect
import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import alignprop_pipe
from alignprop_pipe import rewards
from alignprop_pipe.bundled import MODELS
from alignprop_pipe.rewards import registry

NAMES = [
    module.name
    for module in pkgutil.walk_packages(alignprop_pipe.__path__, "alignprop_pipe.")
    if not module.ispkg and not module.name.endswith("__main__")
    if ">>> " in (Path(alignprop_pipe.__path__[0]).parent / f"{module.name.replace('.', '/')}.py").read_text("utf-8")
]


@pytest.mark.skipif(any(model.missing for model in MODELS), reason="the bundled models are not here")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    result = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("module", [alignprop_pipe, rewards], ids=lambda module: module.__name__)
def test_everything_public_has_an_example(module: ModuleType) -> None:
    public = {name: getattr(module, name) for name in module.__all__}
    functions = {name: one for name, one in public.items() if callable(one)}
    assert len(functions) > 20
    assert [name for name, one in functions.items() if ">>> " not in (inspect.getdoc(one) or "")] == []
