"""`score`, `rewards` and `rewards check` as a user meets them: exit codes, tables, CSV, JSON, what stands where."""

import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from command_line import json_lines, run
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from alignprop_pipe.cli import console
from alignprop_pipe.images import png_bytes
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.rewards import REGISTRY, RewardEntry, registry

OWN = (
    "from alignprop_pipe.rewards import register\n\n@register('own')\ndef own(images, factor=1.0):\n    '''A test.'''\n"
)
OWN += "    return factor * images.mean((1, 2, 3))\n"


@pytest.fixture(autouse=True)
def _registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", dict(REGISTRY))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with three pictures of two sizes, from dark to bright, each with its prompt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    Path("pictures").mkdir()
    for number, name in enumerate(("dark", "grey", "bright")):
        image = Image.new("RGB", (64, 64 + number % 2), (60 * number + 30,) * 3)
        Path("pictures", f"{name}.png").write_bytes(png_bytes([image], {"prompt": f"{number + 1} dogs"}))
    Path("pictures", "notes.txt").write_text("no picture")
    return tmp_path


def table_rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip().startswith("pictures/")]


# --- score -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_a_table_with_the_best_first_and_every_part() -> None:
    result = run("score", "pictures", "--reward", "brightness + 0.1*jpeg")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    rows = table_rows(result.stdout)
    assert [row[0] for row in rows] == [f"pictures/{name}.png" for name in ("bright", "grey", "dark")]
    header = next(line for line in result.stdout.splitlines() if "score" in line and "jpeg_kb" in line)
    assert header.split() == ["file", "score", "brightness", "jpeg", "jpeg_kb", "prompt"]
    assert [float(row[2]) for row in rows] == pytest.approx([150 / 255, 90 / 255, 30 / 255], abs=1e-4)
    assert rows[0][-2:] == ["3", "dogs"]
    foot = {line.strip().split("  ")[0]: line.split()[-4:] for line in result.stdout.splitlines() if "  0." in line}
    assert float(foot["mean"][1]) == pytest.approx(90 / 255, abs=1e-4)
    assert float(foot["standard deviation"][1]) == pytest.approx(60 / 255, abs=1e-4)
    assert "3 pictures scored, mean 0.35" in result.stdout


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_picture_is_one_line_in_any_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the file and its score are always there; folders, parts and prompts only where they fit."""
    monkeypatch.setenv("COLUMNS", str(width))
    folder = Path("pictures", "ein sehr langer Ordner", "und noch einer mit 図", "und einer")
    folder.mkdir(parents=True)
    names = [f"{number:03d}-two-dogs.png" for number in range(5)]
    for number, name in enumerate(names):
        image = Image.new("RGB", (64, 64), (50 * number,) * 3)
        (folder / name).write_bytes(png_bytes([image], {"prompt": f"{number} dogs " + "and a cat " * 9}))
    result = run("score", folder, "--reward", "brightness + 0.1*jpeg + 0.01*sharpness + tv")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()[1:]  # the first one names the reward in full
    assert max(map(cell_len, lines)) <= width
    rows = [line for line in lines if "-two-dogs.png" in line]
    assert [line[: line.index(".png")][-12:] for line in rows] == [name[:-4] for name in reversed(names)]
    for line in rows:
        assert re.fullmatch(r"-?[\d.e-]+", line.partition(".png")[2].split()[0])
    (header,) = (line for line in lines if line.split()[:2] == ["file", "score"])
    if width == 200:
        assert str(folder / names[0]) in result.stdout
    assert ("prompt" in header) == (width == 200)
    assert ("no room for" in result.stdout) == (width < 200)


@pytest.mark.usefixtures("place")
def test_top_shows_the_best_and_the_mean_of_all() -> None:
    every, best = (run("score", "pictures", "--reward", "brightness", *top) for top in ((), ("--top", "1")))
    assert len(table_rows(every.stdout)) == 3
    (row,) = table_rows(best.stdout)
    assert row[0] == "pictures/bright.png"
    assert "brightness, the best 1 of 3" in best.stdout
    assert best.stdout.splitlines()[-1] == every.stdout.splitlines()[-1]
    assert "mean 0.3529" in best.stdout
    record, summary = json_lines(run("score", "pictures", "--reward", "brightness", "--top", "1", "--json").stdout)
    assert (record["file"], summary["pictures"]) == ("pictures/bright.png", 3)
    assert run("score", "pictures", "--reward", "brightness", "--top", "0").exit_code == 2


@pytest.mark.usefixtures("place")
def test_csv_and_json_say_the_same() -> None:
    expression = "brightness + 0.1*jpeg"
    told = json_lines(run("score", "pictures", "--reward", expression, "--json").stdout)
    written = run("score", "pictures", "--reward", expression, "--csv", "scores.csv")
    piped = run("score", "pictures", "--reward", expression, "--csv", "-")
    assert (written.exit_code, piped.exit_code) == (0, 0)
    assert Path("scores.csv").read_text() == piped.stdout
    assert "best first" in written.stdout
    assert "best first" in piped.stderr
    rows = list(csv.DictReader(io.StringIO(piped.stdout)))
    assert list(rows[0]) == ["file", "prompt", "score", "brightness", "jpeg", "jpeg_kb"]
    assert [line["type"] for line in told] == ["score"] * 3 + ["summary"]
    for row, line in zip(rows, told[:3], strict=True):
        assert (row["file"], row["prompt"]) == (line["file"], line["prompt"])
        assert float(row["score"]) == line["score"]
        assert {name: float(row[name]) for name in line["parts"]} == line["parts"]
    assert told[-1]["pictures"] == 3
    assert told[-1]["skipped"] == 0
    assert told[-1]["columns"]["score"]["mean"] == pytest.approx(sum(line["score"] for line in told[:3]) / 3)


@pytest.mark.usefixtures("place")
def test_quiet_says_one_line() -> None:
    result = run("score", "pictures", "--reward", "brightness", "--quiet")
    assert result.stdout == "3 pictures scored, mean 0.3529, standard deviation 0.24\n"
    assert result.stderr == ""
    one = run("score", "pictures/grey.png", "--reward", "brightness", "--quiet")
    assert one.stdout == "1 picture scored, mean 0.3529\n"


@pytest.mark.usefixtures("place")
def test_a_damaged_file_is_named_and_skipped_and_the_end_is_1() -> None:
    Path("pictures", "cut.png").write_bytes(Path("pictures", "grey.png").read_bytes()[:150])
    Path("pictures", "text.jpg").write_text("no picture")
    result = run("score", "pictures", "--reward", "brightness", "--csv", "scores.csv")
    assert result.exit_code == 1
    assert sorted(line.split(": ")[1] for line in result.stderr.splitlines()) == [
        str(Path("pictures", name)) for name in ("cut.png", "text.jpg")
    ]
    assert "3 pictures scored, 2 skipped" in result.stdout
    assert len(Path("scores.csv").read_text().splitlines()) == 4
    alone = run("score", "pictures/cut.png", "--reward", "brightness", "--json")
    assert alone.exit_code == 1
    (summary,) = json_lines(alone.stdout)
    assert (summary["pictures"], summary["skipped"]) == (0, 1)
    assert summary["columns"]["score"]["mean"] is None


@pytest.mark.usefixtures("place")
def test_prompts_from_the_file_from_the_flag_and_from_nowhere() -> None:
    own = json_lines(run("score", "pictures", "--reward", "clip", "--json").stdout)
    assert [line["prompt"] for line in sorted(own[:3], key=lambda line: line["prompt"])] == [
        "1 dogs",
        "2 dogs",
        "3 dogs",
    ]
    same = run("score", "pictures", "--reward", "clip", "--prompt", "two cats")
    assert "clip, best first; prompt: two cats\n" in same.stdout
    Image.new("RGB", (64, 64)).save("pictures/nameless.png")
    refused = run("score", "pictures", "--reward", "0.1*clip")
    assert refused.exit_code == 2
    assert "nameless.png" in refused.stderr
    assert "--prompt" in refused.stderr
    assert run("score", "pictures", "--reward", "brightness").exit_code == 0
    assert run("score", "pictures", "--reward", "clip", "--prompt", "").exit_code == 0


@pytest.mark.usefixtures("place")
def test_a_judge_takes_its_targets_from_the_prompt_set() -> None:
    prompt = PromptSet.load("emoji").prompts[7]
    for name in ("a", "b"):
        Path(f"{name}.png").write_bytes(png_bytes([Image.new("RGB", (64, 64), "red")], {"prompt": prompt}))
    result = run("score", "a.png", "b.png", "--reward", "emoji_judge", "--prompts", "emoji", "--json")
    assert result.exit_code == 0, result.output
    first, second, _ = json_lines(result.stdout)
    assert first["parts"] == second["parts"]
    assert {"emoji_judge", "emoji_judge.subject", "emoji_judge.count", "emoji_judge.background"} == set(first["parts"])
    without = run("score", "a.png", "--reward", "emoji_judge")
    assert without.exit_code == 2
    assert "columns" in without.stderr


@pytest.mark.usefixtures("place")
def test_a_sheet_is_left_out_of_a_folder() -> None:
    Path("pictures", "grid.png").write_bytes(png_bytes([Image.new("RGB", (9, 9))], {"sheet": "grid"}))
    result = run("score", "pictures", "--reward", "clip")
    assert result.exit_code == 0, result.output
    assert "left out: pictures/grid.png" in result.stdout
    assert "3 pictures scored" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "IMAGES"),
        (["pictures"], "--reward"),
        (["nowhere", "--reward", "tv"], "nowhere"),
        ([".", "--reward", "clipp"], "clip"),
        (["pictures", "--reward", "tv", "--prompt", "a", "--prompts", "emoji"], "not both"),
        (["pictures", "--reward", "tv", "--prompts", "emoji"], "prompts do not fit 3 pictures"),
        (["pictures", "--reward", "tv", "--prompts", "missing.txt"], "missing.txt"),
        (["pictures", "--reward", "tv", "--csv", "no/folder.csv"], "--csv"),
        (["pictures", "--reward", "tv", "--csv", "pictures"], "--csv"),
        (["pictures", "--reward", "tv", "--csv", "-", "--json"], "--csv"),
        (["pictures", "--reward", "tv", "--batch-size", "0"], "batch-size"),
        (["pictures", "--reward", "tv", "--device", "gpu"], "cpu"),
        (["pictures", "--reward", "tv", "--import", "missing.py"], "missing.py"),
        (["pictures", "--reward", "zscore(tv)"], "calibrate"),
    ],
)
@pytest.mark.usefixtures("place")
def test_wrong_use_ends_with_2_and_the_way_out(arguments: list[str], said: str) -> None:
    result = run("score", *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.usefixtures("place")
def test_a_reward_that_fails_is_one_line() -> None:
    Path("odd.py").write_text("def score(images):\n    raise KeyError('surprise')\n")
    result = run("score", "pictures", "--reward", "odd.py:score")
    assert result.exit_code == 1
    assert "surprise" in result.stderr
    assert "Traceback" not in result.output
    assert "Traceback" in run("score", "pictures", "--reward", "odd.py:score", "--debug").stderr


@pytest.mark.usefixtures("place")
def test_ctrl_c_keeps_what_is_scored_and_ends_with_130() -> None:
    Path("slow.py").write_text(
        "import signal\ncalls = []\ndef score(images):\n    calls.append(1)\n"
        "    if len(calls) == 2: signal.raise_signal(signal.SIGINT)\n    return images.mean((1, 2, 3))\n"
    )
    result = run("score", "pictures", "--reward", "slow.py:score", "--batch-size", "1", "--csv", "scores.csv")
    assert result.exit_code == 130, result.output
    assert "interrupted after 1 of 3 pictures" in result.stderr
    assert len(Path("scores.csv").read_text().splitlines()) == 2


@pytest.mark.usefixtures("place")
def test_the_bar_is_drawn_on_stderr_and_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    plain = console._rich_console
    terminal = Console(file=drawn, force_terminal=True, width=80)
    monkeypatch.setattr(console, "_rich_console", lambda *, stderr: terminal if stderr else plain(stderr=stderr))
    assert run("score", "pictures", "--reward", "brightness").exit_code == 0
    assert "3/3" in drawn.getvalue()
    drawn.truncate(0)
    assert run("score", "pictures", "--reward", "brightness", "--quiet").exit_code == 0
    assert drawn.getvalue().strip("\0") == ""


@pytest.mark.skipif(os.name == "nt", reason="names of files are Unicode there")
@pytest.mark.usefixtures("place")
def test_names_that_no_terminal_can_show() -> None:
    name = os.fsdecode(b"pictures/\xff[red]x.png")
    Path("pictures/grey.png").rename(name)
    for flags in ([], ["--json"], ["--csv", "-"]):
        result = run("score", "pictures", "--reward", "brightness", *flags)
        assert result.exit_code == 0, result.output
        assert "[red]x.png" in result.stdout


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_the_list_says_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(source: str, file: str) -> str | None:
        return "/somewhere" if source == "org/here" and file == "model.safetensors" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", known)
    about = {"summary": "looks", "licence": "MIT", "where": "m:C", "size_mb": 1710.5, "memory_mb": 42.0}
    for name, weights in (
        ("there", (("org/here", "model.safetensors"),)),
        ("half", (("org/here", "model.safetensors"), ("org/here", "head.safetensors"))),
    ):
        registry.REGISTRY[name] = RewardEntry(name=name, weights=weights, range_text="0 to 10", **about)
    entries = {line["name"]: line for line in json_lines(run("rewards", "--json").stdout)}
    assert entries["there"]["here"] is True
    assert entries["half"]["here"] is False
    assert entries["brightness"]["here"] is None
    assert entries["clip"]["here"] is True
    assert entries["there"]["weights"] == [{"repository": "org/here", "file": "model.safetensors"}]
    assert entries["there"]["range"] == "0 to 10"
    assert entries["emoji_judge"]["judge"] is True
    monkeypatch.setenv("COLUMNS", "200")
    text = run("rewards").output
    for words in ("org/here", "1.7 GB to download, 42 MB of memory", "range: 0 to 10", "MIT", "bundled: emoji-scorer"):
        assert words in text


def test_every_entry_says_what_it_is() -> None:
    for entry in REGISTRY.values():
        assert entry.summary
        assert entry.licence
        assert entry.range_text
        assert not (entry.bundled and entry.weights)
        assert bool(entry.weights or entry.bundled) == (entry.memory_mb > 0), entry.name
        assert bool(entry.weights) == (entry.size_mb > 0), entry.name


def test_the_list_loads_no_torch() -> None:
    code = (
        "import sys\nsys.argv = ['alignprop', 'rewards']\nfrom alignprop_pipe.cli.app import app\n"
        "try: app()\nfinally: print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.usefixtures("place")
def test_rewards_of_ones_own_are_listed_and_used() -> None:
    Path("mine.py").write_text(OWN)
    text = run("rewards", "--import", "mine.py").output
    assert "own" in text
    assert "A test." in text
    half = run("score", "pictures/grey.png", "--import", "mine.py", "--reward", "own(factor=0.5)", "--quiet")
    assert half.stdout == "1 picture scored, mean 0.1765\n"
    checked = run("rewards", "check", "own + tv", "--import", "mine.py", "--size", "16", "--device", "cpu")
    assert checked.exit_code == 0, checked.output


# --- rewards check ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_check_measures_the_whole_and_each_part() -> None:
    arguments = ["rewards", "check", "clip + 0.1*jpeg", "--size", "64", "--device", "cpu"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.rstrip().endswith(" ok")}
    assert set(rows) == {"clip", "jpeg"}  # the first line begins with clip, and is written over by the part
    assert "ok: clip + 0.1*jpeg can train" in result.stdout
    trials = json_lines(run(*arguments, "--json").stdout)
    assert [trial["reward"] for trial in trials] == ["clip + 0.1*jpeg", "clip", "jpeg"]
    for trial in trials:
        assert trial["type"] == "check"
        assert trial["ok"] is True
        assert trial["gradient_norm"] > 0
        assert trial["seconds"] > 0
        assert trial["lowest"] <= trial["highest"]
        assert trial["activations_mb"] > 0
    assert trials[1]["weights_mb"] > 1


@pytest.mark.usefixtures("place")
def test_a_refusal_ends_with_1_and_says_where() -> None:
    Path("cut.py").write_text("def score(images):\n    return images.detach().mean((1, 2, 3))\n")
    result = run("rewards", "check", "brightness + cut.py:score", "--size", "16", "--device", "cpu")
    assert result.exit_code == 1
    assert "detach() in cut.py, line 2" in result.stderr
    assert result.stderr.count("refused:") == 1
    assert "refused" in result.stdout
    judge = run("rewards", "check", "emoji_judge", "--device", "cpu", "--quiet")
    assert (judge.exit_code, judge.stdout) == (1, "")
    assert "judge" in judge.stderr


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "EXPR"), (["clipp"], "clip"), (["tv", "--size", "0"], "size"), (["tv", "--x"], "--x")]
)
@pytest.mark.usefixtures("place")
def test_wrong_use_of_check(arguments: list[str], said: str) -> None:
    result = run("rewards", "check", *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
