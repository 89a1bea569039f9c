"""The commands as a user meets them: exit codes, what stands on stdout and stderr, and the files left behind."""

import io
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import miniatures
import pytest
import torch
from command_line import json_lines, run
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from alignprop_pipe import bundled
from alignprop_pipe.cli import console
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.errors import AdapterError, ConfigError, PromptError, RewardError, RewardShapeError
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.records import Evidence, StepRecord

SMALL = ["--reward", "brightness", "--num-inference-steps", "2", "--batch-size", "2", "--eval-batch-size", "2"]
SMALL += ["--gradient-accumulation-steps", "1", "--eval-prompts", "2", "--device", "cpu", "--steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    miniatures.sd15().save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a prompt file."""
    monkeypatch.chdir(tmp_path)
    prompts = ("a dog", "two cats", "a red fox", "the sea", "# no prompt", "a house", "a boat", "a fish", "snow")
    Path("prompts.txt").write_text("\n".join(prompts))
    return tmp_path


ROOT = str(Path(__file__).parents[1])


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "alignprop_pipe", *map(str, arguments)]


# --- start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["sample", "--help"], ["--version"], ["models"]]
)
def test_talk_that_needs_no_torch_does_not_load_it(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['alignprop', *{arguments!r}]\n"
        "from alignprop_pipe.cli.app import app\n"
        "try: app()\n"
        "finally: print(sorted({'torch', 'diffusers', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version() -> None:
    import alignprop_pipe

    assert run("--version").output == f"alignprop-pipe {alignprop_pipe.__version__}\n"


@pytest.mark.parametrize(
    ("name", "entry"), [("rewards", "brightness"), ("models", "emoji-judge"), ("prompts", "animals")]
)
def test_lists(name: str, entry: str) -> None:
    assert entry in run(name).output
    lines = json_lines(run(name, "--json").stdout)
    assert entry in [line["name"] for line in lines]
    assert {key for line in lines for key in line if not re.fullmatch("[a-z][a-z0-9_]*", key)} == set()
    assert all(isinstance(line.get("targets", []), list) for line in lines)
    assert all(line["type"] == "entry" for line in lines)


# --- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "org/name"], "--reward"),
        (["train", "org/name", "--reward", "jpeg"], "--prompts"),
        (["train", "--reward", "clipp"], "clip"),
        (["train", "--reward", "clip +"], "clip"),
        (["train", "--reward", "brightness", "--prompts", "missing.txt"], "missing.txt"),
        (["train", "--reward", "brightness", "--prompts", "emojy"], "emoji"),
        (["train", "--prompts", "emoji", "--prompt", "a dog"], "not both"),
        (["train", "--steps", "0"], "steps"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--stepps", "3"], "--steps"),
        (["train", "--truncation", "last"], "last:5"),
        (["train", "--preset", "papper"], "paper"),
        (["train", "--config", "missing.toml"], "missing.toml"),
        (["train", "--dtype", "int8"], "bfloat16"),
        (["train", "--reward", "brightness", "--device", "gpu"], "cpu"),
        (["trian"], "train"),
        (["sample", "--compare"], "--adapter"),
        (["sample", "--scale", "2"], "--adapter"),
        (["sample", "--adapter", "missing.safetensors"], "missing.safetensors"),
        (["sample", "org/name"], "PROMPT"),
        (["sample", "--num", "0"], "num"),
    ],
)
@pytest.mark.usefixtures("place")
def test_wrong_use_ends_with_2_and_the_way_out(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert not list(Path.cwd().glob("runs*"))


@pytest.mark.skipif(bundled.MODELS[2].missing is not None, reason="the judge's weights are not here")
@pytest.mark.usefixtures("place")
def test_a_judge_is_no_reward(model: Path) -> None:
    result = run("train", model, *SMALL, "--prompts", "emoji", "--reward", "brightness + emoji_judge")
    assert result.exit_code == 2, result.output
    assert "judge" in result.stderr


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("name", "code"),
    [("./nowhere", 2), ("nowhere.safetensors", 2), ("org/name", 2), ("./empty", 2), ("./broken.safetensors", 1)],
)
def test_a_model_that_cannot_be_loaded_is_named(name: str, code: int) -> None:
    Path("empty").mkdir()
    Path("broken.safetensors").write_bytes(b"no tensors")
    result = run("train", name, *SMALL, "--prompts", "prompts.txt")
    assert result.exit_code == code, result.output
    assert Path(name).name in result.stderr
    assert any(words in result.stderr for words in ("emoji", "copy or download it again", "HF_HUB_OFFLINE"))
    assert "unexpected" not in result.stderr


@pytest.mark.usefixtures("place")
def test_all_that_is_wrong_is_told_at_once() -> None:
    """Before anything is loaded, drawn or written; the exit code is 2."""
    Path("taken").mkdir()
    Path("taken/thesis.txt").write_text("mine")
    Path("wrong.toml").write_text("stepps = 3")
    words = ["models/none", "--reward", "clipp", "--prompts", "none.txt", "--out", "taken", "--report-to", "wandbb"]
    result = run("train", *words, "--config", "wrong.toml", "--device", "gpu")
    assert result.exit_code == 2, result.output
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    expected = ("stepps", "models/none", "clipp", "none.txt", "taken", "wandbb", "gpu")
    assert [word for word in expected if not any(word in line for line in told)] == []
    assert len(told) == len(expected)
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["prompts.txt", "taken", "wrong.toml"]


@pytest.mark.usefixtures("place")
def test_wrong_judges_are_told_with_all_else_and_before_anything_is_drawn() -> None:
    """With wrong settings too: what was typed is known then."""
    typed = ["--judges", "nonsense", "--judges", "nope.py:x", "--judges", "clip(model='models/x')"]
    wrong = run("train", "--steps", "0", "--reward", "tv(", *typed)
    assert wrong.exit_code == 2
    for said in ("steps = 0", "tv(", "'nonsense' is not known", "no file 'nope.py'", "hf://models/x"):
        assert said in " ".join(wrong.output.split())
    wrong = run("train", "--judges", "tv", "--keep-best", "jpeg")
    assert wrong.exit_code == 2
    assert "the judges are 'tv'" in wrong.output
    assert "loading" not in wrong.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--judges", "jpeg", "--judges", "jpegg"], "reward 'jpegg' is not known"),
        (["--judges", "2*jpeg", "--keep-best", "tv"], "keep_best = 'tv': no judge has this name"),
    ],
)
def test_a_judge_that_is_not_there_is_told_before_anything_is_loaded(words: list[str], said: str) -> None:
    result = run("train", "./none", "--reward", "clipp", "--prompt", "a dog", *words)
    assert result.exit_code == 2, result.output
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 3  # with the model and the reward
    assert said in told[2]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["sample", "models/none", "--adapter", "none.safetensors", "--out", "prompts.txt/x", "--device", "gpu"],
            ("models/none' here", "none.safetensors", "prompts.txt/x", "gpu", "what should"),
        ),
        (
            ["sample", "a dog", "--adapter", "x.safetensors", "--window", "0.9-0.1", "--out", "/proc/x"],
            ("x.safetensors", "0.9", "/proc"),
        ),
        (
            ["score", "none.png", "--reward", "clipp", "--prompts", "none.txt", "--device", "gpu"],
            ("none.png", "clipp", "none.txt", "gpu"),
        ),
    ],
)
def test_the_other_commands_tell_all_at_once(words: list[str], expected: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.exit_code == 2, result.output
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [word for word in expected if not any(word in line for line in told)] == []
    assert len(told) == len(expected)
    assert [path.name for path in Path.cwd().iterdir()] == ["prompts.txt"]


def test_the_table_of_errors() -> None:
    assert console.verdict(ConfigError("steps"))[0] == 2
    assert console.verdict(PromptError("empty"))[0] == 2
    assert console.verdict(RewardError("unknown"))[0] == 2
    assert console.verdict(RewardShapeError("shape")) == (1, "shape")
    assert console.verdict(AdapterError("damaged")) == (1, "damaged")
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("can't allocate memory: 9"),
    ):
        code, text = console.verdict(error)
        assert code == 1
        assert "--batch-size" in text
    code, text = console.verdict(KeyError("odd"))
    assert code == 1
    assert "--debug" in text
    assert "KeyError" in text


# --- train -----------------------------------------------------------------------------------------------------------


def test_dry_run(model: Path, place: Path) -> None:
    result = run("train", model, *SMALL, "--prompts", "prompts.txt", "--dry-run")
    assert result.exit_code == 0, result.output
    for words in ("trainable parameters", "denoiser calls", "memory of the process", "time", "looks"):
        assert words in result.stdout
    said = run("train", model, *SMALL, "--prompts", "prompts.txt", "--dry-run", "--json")
    (forecast,) = json_lines(said.stdout)
    assert forecast["type"] == "forecast"
    assert forecast["trainable_parameters"] > 0
    assert forecast["denoiser_calls_per_step"] > 0
    assert forecast["process_mb"] > 100
    seconds = forecast["steps"] * forecast["seconds_per_step"]
    assert forecast["seconds"] > seconds
    assert not (place / "runs").exists()


@pytest.mark.usefixtures("place")
def test_train_says_a_line_for_each_step_and_leaves_a_run_folder(model: Path) -> None:
    result = run("train", model, *SMALL, "--prompts", "prompts.txt", "--out", "out", "--eval-prompts", "3")
    assert result.exit_code == 0, result.output
    steps = [line for line in result.stdout.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/2", "2/2"]
    assert "before: held-out" in result.stdout
    assert "3 held-out prompts, same noise" in result.stdout
    assert "alignprop sample" in result.stdout
    assert result.stderr == ""
    for name in ("adapter.safetensors", "config.json", "metrics.jsonl", "curve.png", "before-after.png", "report.html"):
        assert (Path("out") / name).stat().st_size > 0
    assert load_file("out/adapter.safetensors")
    again = run("train", model, *SMALL, "--prompts", "prompts.txt", "--out", "out")
    assert again.exit_code == 2
    assert "--out" in again.stderr


@pytest.mark.usefixtures("place")
def test_json_stands_alone_on_stdout_and_the_default_folder_is_named(model: Path) -> None:
    result = run("train", model, *SMALL, "--prompt", "a dog", "--prompt", "a cat", "--json")
    assert result.exit_code == 0, result.output
    lines = json_lines(result.stdout)
    assert [line["type"] for line in lines] == ["step", "step", "step", "result"]
    assert [line.get("step") for line in lines[:3]] == [0, 1, 2]
    assert lines[0]["loss"] is None
    assert "reward" in lines[0]["evidence"]
    last = lines[-1]
    assert not last["interrupted"]
    assert Path(last["files"]["adapter"]).is_file()
    assert set(last["files"]) == {"adapter", "before_after", "report", "run_folder"}
    assert Path(last["run_folder"]).parent == Path("runs")
    assert "brightness" in last["run_folder"]
    assert "step 2/2" in result.stderr


@pytest.mark.usefixtures("place")
def test_quiet_says_only_where_the_files_are(model: Path) -> None:
    result = run("train", model, *SMALL, "--prompts", "prompts.txt", "--out", "out", "--quiet", "--eval-prompts", "0")
    assert result.exit_code == 0, result.output
    assert all("out" in line for line in result.stdout.splitlines())
    assert "adapter:" in result.stdout
    assert result.stderr == ""


@pytest.mark.usefixtures("place")
def test_an_unexpected_error_is_one_line_and_debug_shows_where(model: Path) -> None:
    Path("odd.py").write_text(
        "calls = []\ndef score(images):\n    calls.append(1)\n    if len(calls) > 3: raise KeyError('surprise')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    arguments = ["train", model, *SMALL, "--prompts", "prompts.txt", "--reward", "odd.py:score"]
    result = run(*arguments)
    assert result.exit_code == 1
    assert "surprise" in result.stderr
    assert "Traceback" not in result.output
    assert "Traceback" in run(*arguments, "--debug").stderr


def test_on_a_terminal_the_line_is_drawn_over_and_fits_80_columns() -> None:
    shown = io.StringIO()
    output = console.Output()
    output.console = Console(file=shown, force_terminal=True, width=80)
    look = Evidence(0, ("a",), 0.2345678, {}, {"emoji_judge": 0.5, "emoji_judge.count": 0.6}, 0.3, {})
    common = {"parts": {}, "grad_norm": 1.0, "distance": None, "graded": (1,), "memory_mb": 12345.6}
    split = PromptSet.load("emoji").split(100, 0)
    with console.Progress(output, AlignConfig.preset("emoji"), split) as progress:
        progress.on_step(StepRecord(step=0, loss=math.nan, reward=math.nan, seconds=0.0, evidence=look, **common))
        progress.on_step(StepRecord(step=1, loss=-0.2, reward=0.2123456, seconds=1.0, skipped=True, **common))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert "rendering 100 held-out pictures" in text
    assert "step 0: held-out 0.2346, emoji_judge 0.5, diversity 0.3" in text
    assert "step 1: skipped" in text
    last = text.rstrip().splitlines()[-1]
    assert f"1/{AlignConfig.preset('emoji').steps}" in last
    assert "reward 0.2123  held-out 0.2346  12.1 GB" in last
    assert "nan" not in text


# --- what the run says of itself -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_a_run_that_diverged_fails_and_says_where_the_last_good_adapter_is(model: Path) -> None:
    arguments = ["train", model, *SMALL, "--prompts", "prompts.txt", "--lr", "1e10", "--steps", "2", "--out", "out"]
    result = run(*arguments, "--json")
    assert result.exit_code == 1
    assert "error: a step was undone that made weights of" in result.stderr
    last = json_lines(result.stdout)[-1]
    assert last["status"].startswith("failed: a step was undone")
    assert (last["kept_step"], last["interrupted"], last["held_out"]) == (0, False, {})
    assert Path(last["files"]["adapter"]) == Path("out", "adapter.safetensors")
    weights = load_file("out/adapter.safetensors")
    assert all(weight.abs().max() < 10 for weight in weights.values())
    assert json.loads(Path("out/config.json").read_text())["result"]["status"] == last["status"]


@pytest.mark.usefixtures("place")
def test_few_prompts_are_told_and_nothing_is_called_held_out(model: Path) -> None:
    result = run("train", model, *SMALL, "--prompt", "a dog", "--prompt", "a cat", "--eval-prompts", "4")
    assert result.exit_code == 0, result.output
    assert "training on 2 prompts, too few to hold any out: the evidence is 4 pictures" in result.stdout
    assert "rendering 4 pictures of training prompts" in result.stdout
    assert "4 pictures of training prompts, fresh noise" in result.stdout
    assert "held-out" not in result.stdout
    assert not re.search(r"\bnan\b", result.output)


@pytest.mark.usefixtures("place")
def test_one_picture_shows_no_nan(model: Path) -> None:
    result = run("train", model, *SMALL, "--prompts", "prompts.txt", "--eval-prompts", "1", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "training on 7 prompts, 1 held out" in result.stdout
    assert not re.search(r"\bnan\b", result.output)
    assert not re.search(r"\bnan\b", Path("out/report.html").read_text())


@pytest.mark.usefixtures("place")
def test_the_judge_that_is_followed_is_named_and_one_that_is_not_there_refused(model: Path) -> None:
    chosen = ["--prompts", "prompts.txt", "--eval-every", "1", "--steps", "3"]
    result = run("train", model, *SMALL, *chosen, "--judges", "sharpness", "--keep-best", "judge", "--json")
    assert result.exit_code == 0, result.output
    assert "of 3 evaluations by the judge sharpness" in result.stderr
    assert json_lines(result.stdout)[-1]["chosen_from"] == 3
    for wrong, words in (
        (["--keep-best", "nope", "--judges", "tv"], "no judge has this name; the judges are 'tv'"),
        (["--keep-best", "judge"], "a judge to follow is needed in judges"),
        (["--patience", "2", "--eval-every", "0"], "with eval_every = 0 no evaluation is taken"),
    ):
        refused = run("train", model, *SMALL, *chosen, *wrong)
        assert refused.exit_code == 2, refused.output
        assert words in re.sub(r"\s+", " ", refused.stderr)
    assert "loading" not in refused.output  # of the last one: before anything is loaded


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_with_128_and_its_number_and_everything_saved(number: int, model: Path, place: Path) -> None:
    arguments = [*SMALL, "--steps", "10000", "--prompts", "prompts.txt", "--out", "out"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": place}
    environment = {**os.environ, "PYTHONPATH": ROOT}
    with subprocess.Popen(command("train", model, *arguments), env=environment, **how) as process:
        wait_for_lines(place / "out" / "metrics.jsonl", 3, process)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + number, stderr
    assert "interrupted after" in stdout
    assert str(Path("out", "adapter.safetensors")) in stdout
    assert "Traceback" not in stdout + stderr
    assert load_file(place / "out" / "adapter.safetensors")
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["evidence"]["step"] == lines[-1]["step"] < 10000
    assert (place / "out" / "report.html").stat().st_size > 0
    assert not list((place / "out").rglob("*.tmp"))


def wait_for_lines(path: Path, lines: int, process: subprocess.Popen) -> None:
    for _ in range(3000):
        if process.poll() is not None or (path.exists() and len(path.read_text().splitlines()) >= lines):
            return
        time.sleep(0.1)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_closed_terminal_loses_nothing(model: Path, place: Path) -> None:
    """The terminal is a real one; once its other end is closed, writing to it fails."""
    import pty

    metrics = place / "out" / "metrics.jsonl"
    ours, theirs = pty.openpty()
    arguments = command("train", model, *SMALL, "--steps", "10000", "--prompts", "prompts.txt", "--out", "out")
    start = f"""import fcntl, os, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv({sys.executable!r}, {list(map(str, arguments))!r})"""
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "cwd": place, "start_new_session": True}
    environment = {**os.environ, "PYTHONPATH": ROOT}
    with subprocess.Popen([sys.executable, "-c", start], env=environment, **streams) as process:
        os.close(theirs)
        while len(metrics.read_text().splitlines() if metrics.exists() else []) < 3 and process.poll() is None:
            if select.select([ours], [], [], 0.1)[0]:  # a full buffer would hold the run up
                os.read(ours, 4096)
        os.close(ours)
        assert process.wait(timeout=300) == 129
    assert load_file(place / "out" / "adapter.safetensors")
    assert (place / "out" / "report.html").stat().st_size > 0
    assert "interrupted after" in (place / "out" / "config.json").read_text()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", SIGNALS[1:])
def test_a_signal_is_heard_where_ctrl_c_is_ignored(number: int) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), console.signals_as_interrupt():
            signal.raise_signal(number)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_under_nohup_a_closed_terminal_changes_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with console.signals_as_interrupt() as came:
            signal.raise_signal(signal.SIGHUP)
        assert came == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- sample ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    done = run("train", model, *SMALL, "--prompt", "a dog", "--lr", "0.1", "--out", folder)
    assert done.exit_code == 0, done.output
    return folder / "adapter.safetensors"


def test_sample_writes_pictures_that_say_how_they_were_made(model: Path, adapter: Path, place: Path) -> None:
    arguments = [model, "a dog", "two cäts", "--num", "2", "--seed", "3", "--num-inference-steps", "2"]
    arguments += ["--adapter", adapter, "--scale", "0.5"]
    (told, *_) = json_lines(run("sample", *arguments, "--out", "numbers", "--json").stdout)
    assert (told["seed"], told["number"], told["scale"], told["num_inference_steps"]) == (3, 0, 0.5, 2)
    assert isinstance(told["guidance_scale"], float)
    result = run("sample", *arguments, "--out", "pictures")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    names = sorted(path.name for path in Path("pictures").iterdir())
    assert names == ["001-a-dog.png", "002-a-dog.png", "003-two-cats.png", "004-two-cats.png", "grid.png"]
    about = Image.open("pictures/004-two-cats.png").text  # type: ignore[attr-defined]
    assert about["prompt"] == "two cäts"
    assert (about["seed"], about["number"], about["scale"]) == ("3", "1", "0.5")
    assert (about["adapter"], about["model"]) == ("adapter.safetensors", "tiny")
    assert about["num_inference_steps"] == "2"
    assert about["software"].startswith("alignprop-pipe ")
    assert str(place) not in str(about)


def test_sample_draws_any_text(model: Path, place: Path) -> None:
    """What is no path is a prompt, whatever its letters; half a character is refused before the model is loaded."""
    texts = [
        "a fox " * 50,
        "a" * 256,
        "~nobody-here is a fox",
        "a fox\nin the snow",
        "../ is a place",
        "🦊" * 120,
        "? / *",
    ]
    result = run("sample", model, *texts, "--out", "drawn", "--num-inference-steps", 1, "--height", 16, "--width", 16)
    assert result.exit_code == 0, result.output
    found = [Image.open(path).text["prompt"] for path in sorted(Path("drawn").glob("0*.png"))]  # pyright: ignore[reportAttributeAccessIssue]
    assert found == texts
    refused = run("sample", model, "a fox", "a \udcff", "--out", "drawn")
    assert refused.exit_code == 2
    assert "prompt 2 holds half a character" in refused.stderr


def test_sample_overwrites_nothing_and_repeats_by_seed(model: Path, place: Path) -> None:
    for words in (["a dog"], ["a cat", "a dog"]):
        assert run("sample", model, *words, "--num-inference-steps", "2", "--out", "p").exit_code == 0
    names = sorted(path.name for path in (place / "p").iterdir())
    assert names == ["001-a-dog.png", "002-a-cat.png", "003-a-dog.png", "grid-2.png", "grid.png"]
    first, again = (Image.open(place / "p" / name).tobytes() for name in ("001-a-dog.png", "003-a-dog.png"))
    assert len(first) == len(again)
    largest = max(abs(a - b) for a, b in zip(first, again, strict=True))
    assert largest <= 1  # same noise; a batch of another size may round otherwise


@pytest.mark.usefixtures("place")
def test_compare_puts_base_and_aligned_side_by_side(model: Path, adapter: Path) -> None:
    words = [model, "a dog", "--num-inference-steps", "2"]
    run_folder = adapter.parent
    assert run("sample", *words, "--out", "plain").exit_code == 0
    assert run("sample", *words, "--adapter", run_folder, "--out", "aligned").exit_code == 0
    compared = run("sample", *words, "--adapter", run_folder, "--compare", "--out", "both", "--json")
    assert compared.exit_code == 0, compared.output
    (line,) = json_lines(compared.stdout)
    assert line["file"] == str(Path("both/001-a-dog.png"))
    both = Image.open("both/001-a-dog.png").convert("RGB")
    plain, aligned = (Image.open(f"{name}/001-a-dog.png").convert("RGB") for name in ("plain", "aligned"))
    assert plain.tobytes() != aligned.tobytes()
    for shown, left in ((plain, 0), (aligned, both.width - 256)):
        part = both.crop((left, both.height - 256, left + 256, both.height))
        assert part.tobytes() == shown.resize((256, 256), Image.Resampling.NEAREST).tobytes()


@pytest.mark.usefixtures("place")
def test_an_adapter_of_another_model_is_refused(model: Path) -> None:
    Path("other.safetensors").write_bytes(b"not a tensor file")
    result = run("sample", model, "a dog", "--adapter", "other.safetensors")
    assert result.exit_code == 1
    assert "other.safetensors" in result.stderr
    assert "Traceback" not in result.output
