"""`import alignprop_pipe` and `alignprop --help` load nothing heavy. Modules are looked at, not seconds."""

import subprocess
import sys

import pytest

HEAVY = ["accelerate", "diffusers", "huggingface_hub", "jaxtyping", "kornia", "matplotlib", "numpy", "peft", "torch",
         "transformers"]  # fmt: skip
TELL = f"import sys; loaded = [name for name in {HEAVY!r} if name in sys.modules]; sys.exit(','.join(loaded) or 0)"
COMMAND = "import sys; from alignprop_pipe.cli.app import app; sys.argv = ['alignprop', *{arguments!r}]\n"
RUN = "try: app()\nexcept SystemExit as end: assert end.code in (0, None), end.code\n"


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = run(f"import alignprop_pipe; alignprop_pipe.__version__; dir(alignprop_pipe); {TELL}")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_configuration_loads_nothing_heavy() -> None:
    done = run(f"from alignprop_pipe import AlignConfig, LastK; AlignConfig(truncation=LastK(2)).to_toml(); {TELL}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["sample", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    done = run(COMMAND.format(arguments=arguments) + RUN + TELL)
    assert (done.returncode, done.stderr) == (0, "")
    assert "alignprop" in done.stdout


def test_the_test_would_see_a_heavy_module() -> None:
    assert run(f"import numpy; {TELL}").stderr.strip() == "numpy"
