"""What is taken for a name on the Hub; what may be a mistyped path is told at once, and no socket is opened for it."""

import contextlib
import re
import socket
from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch
import typer
from command_line import run
from hub_server import Hub
from huggingface_hub import constants, hf_api
from test_hub import server as server  # a fixture

from alignprop_pipe import Adapter, AlignConfig, AlignPropPipeline, PromptSet, parse_reward
from alignprop_pipe.adapters.files import located
from alignprop_pipe.adapters.inspect import inspect_adapter
from alignprop_pipe.adapters.mix import mix
from alignprop_pipe.bundled import is_bundled
from alignprop_pipe.cli.drawing import check_out
from alignprop_pipe.cli.opening import check_model, is_model
from alignprop_pipe.cli.planning import SettingsFile
from alignprop_pipe.errors import AlignError, HubError, PipelineError, RewardError
from alignprop_pipe.rewards.networks.weights import place_of
from alignprop_pipe.rewards.scorers.python import load_module
from alignprop_pipe.runs.folder import check_place, read_metrics
from alignprop_pipe.scoring.picture_files import find_pictures
from alignprop_pipe.sources import HubName, exists, expanded, hub_hint, is_file, is_folder, on_hub

NAMES = [
    "lora-library/x", "THUDM/ImageReward", "h94/IP-Adapter", "test-org/x", "me/step-by-step", "me/v1.0", "123/x",
    "me/cute-animals", "me/x.y-z_1", "modelscope/sdxl", "stable-diffusion-v1-5/stable-diffusion-v1-5", "a1/b2",
]  # fmt: skip
PATHS = [
    "x", "a/b/c", "./x", "./x/y", "../x", "~/x", "/tmp/x", "C:\\x\\y", "C:/x", "me\\x", "me/x?y", "", "me/", "/",
    "me/x.safetensors", "me/x.bin", "me/x.JSON", "me/x.pt", "me/x.ckpt", "runs/my-run", "Runs/my-run", "samples/a",
    "outputs/a", "models/sd15", "loras/foxes", "checkpoints/x", "results/x", "me/2026-11-30-2016-clip", "me/2026-01-02",
    "me/2025-01-02-0304-zscore-clip-2", "cats/tabby", "projetc/x", "projects/x", "Project/x",
    "exp/x", "saved/x", "trained/x", "Downloads/x", "Desktop/x", "runs2/x", "my_runs/x", "my-loras/x", "out_1/x",
    "models-v2/x", "me/checkpoint-500", "me/epoch_3", "me/step100", "workspace/x", "content/x", "unet/x",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the folders `cats` and `project`, and no way out to the network."""
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "project"):
        Path(name).mkdir()
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("source", NAMES)
def test_a_name_on_the_hub(source: str) -> None:
    assert on_hub(source) == on_hub(Path(source)) == HubName(source)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("source", PATHS)
def test_a_path(source: str) -> None:
    assert on_hub(source) is None


@pytest.mark.parametrize(
    ("source", "repo", "revision"),
    [
        ("hf://me/x", "me/x", None),
        ("hf://runs/2026-11-30-2016-clip", "runs/2026-11-30-2016-clip", None),
        ("hf://me/x@v1.0", "me/x", "v1.0"),
        ("hf://me/x@refs/pr/3", "me/x", "refs/pr/3"),
        ("hf://me/x/", "me/x", None),
    ],
)
def test_hf_names(source: str, repo: str, revision: str | None) -> None:
    assert on_hub(source) == on_hub(Path(source)) == HubName(repo, revision)


@pytest.mark.parametrize(
    "source", ["hf://", "hf://me", "hf://me/x/y.safetensors", "hf://../x", "hf://me/x@", "hf://a b/c"]
)
def test_an_hf_name_that_is_none(source: str) -> None:
    with pytest.raises(HubError, match="hf://me/name"):
        on_hub(source)


def test_the_way_out_is_said_where_it_is_one() -> None:
    assert hub_hint("runs/x") == "; to fetch it from the Hub, write hf://runs/x"
    assert hub_hint("a/b/c") == hub_hint("x") == ""


@pytest.mark.usefixtures("place", "no_network")
def test_a_mistyped_path_is_told_without_the_network_in_python() -> None:
    pipe = AlignPropPipeline.from_pipe(miniatures.sd15())
    calls: list[Any] = [
        Adapter.load, pipe.load_adapter, inspect_adapter, AlignPropPipeline.from_pretrained, lambda x: mix([(x, 1.0)])
    ]  # fmt: skip
    for source in ("runs/my-run", "project/x", "me/2026-11-30-2016-clip", "me/x.safetensors"):
        for call in calls:
            with pytest.raises(AlignError, match=rf"there is no .*{source}.*hf://{source}"):
                call(source)
    for source in ("sd15", "a/b/c", "/nowhere"):
        with pytest.raises(PipelineError, match="there is no file or folder"):
            AlignPropPipeline.from_pretrained(source)


@pytest.mark.usefixtures("place", "no_network")
@pytest.mark.parametrize(
    "words",
    [
        ["train", "models/sd15", "--reward", "brightness", "--prompt", "a dog"],
        ["train", "me/sd15.safetensors", "--reward", "brightness", "--prompt", "a dog"],
        ["sample", "runs/my-run", "a dog"],
        ["sample", "--adapter", "runs/my-run"],
        ["mix", "runs/a=1", "--out", "b.safetensors"],
        ["mix", "runs/a", "--sweep", "0:1:1", "--out", "b.png"],
        ["export", "runs/a", "--to", "comfyui", "--out", "b.safetensors"],
        ["inspect", "runs/a"],
        ["push", "runs/a", "me/x"],
    ],
)
def test_a_mistyped_path_is_told_without_the_network_on_the_command_line(words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code in (1, 2), result.output
    assert "there is no" in " ".join(result.output.split())
    assert "a socket" not in result.output
    if words[0] != "push":  # which takes what is here
        assert "hf://" in result.output


SCORERS = [
    "clip(model={0})", "pickscore(model={0})", "hpsv2.1(model={0})", "hpsv2(processor={0})", "aesthetic(model={0})",
    "aesthetic(trunk={0})", "aesthetic2.5(model={0}, accept_license=True)", "imagereward(model={0})",
    "imagereward(tokenizer={0})", "ask('is it?', model={0})", "count('dog', 2, model={0})", "without('dog', model={0})",
    "emoji_judge(model={0})", "tv + 2*min(zscore(clip(model={0})), jpeg)",
]  # fmt: skip


@pytest.mark.usefixtures("place", "no_network")
@pytest.mark.parametrize("text", SCORERS)
def test_a_scorer_s_mistyped_path_is_told_before_anything_is_loaded(text: str) -> None:
    pipe = AlignPropPipeline.from_pipe(miniatures.sd15())
    for source, way_out in (("models/x", "hf://models/x"), ("./x", ""), ("project/x", "hf://"), ("hf://x", "hf://me/")):
        with pytest.raises(RewardError, match=rf"{source}.*{way_out}"):
            pipe.align(text.format(repr(source)), ["a dog"], steps=1, num_inference_steps=2)
        result = run(
            "train", "--prompt", "a", "--accept-license", "--reward", text.format(repr(source)), "--out", "out"
        )
        assert result.exit_code == 2, result.output
        assert source in result.output
    with pytest.raises(RewardError, match="hf://models/x"):
        pipe.align("tv", ["a dog"], judges=(text.format("'models/x'"),), steps=1, num_inference_steps=2)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("source", "revision", "place_on_hub"),
    [
        ("me/x", None, ("me/x", None)),
        ("me/x", "v1", ("me/x", "v1")),
        ("hf://models/x", None, ("models/x", None)),
        ("hf://models/x@v1", None, ("models/x", "v1")),
        ("hf://models/x@v1", "v1", ("models/x", "v1")),
        ("openai/clip-vit-large-patch14", None, ("openai/clip-vit-large-patch14", None)),
    ],
)
def test_a_scorer_on_the_hub(source: str, revision: str | None, place_on_hub: tuple[str, str | None]) -> None:
    Path("openai").mkdir()  # a folder like this was never meant: the reward names the model itself
    assert place_of(source, revision) == place_on_hub


def test_two_revisions_are_refused() -> None:
    with pytest.raises(RewardError, match="two revisions"):
        place_of("hf://me/x@v1", "v2")


def test_a_model_from_the_hub_by_its_hf_name(
    server: Hub, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miniatures.sd15().save_pretrained(tmp_path / "saved")
    files = {
        path.relative_to(tmp_path / "saved").as_posix(): path.read_bytes()
        for path in (tmp_path / "saved").rglob("*")
        if path.is_file()
    }
    server.add("models/tiny", files)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    pipe = AlignPropPipeline.from_pretrained("hf://models/tiny@main")
    assert pipe.name_or_path == "models/tiny"
    weights = miniatures.sd15().unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in pipe.unet.state_dict().items())


# --- any text may be asked about -------------------------------------------------------------------------------------

TEXTS = [
    "a fox " * 50, "a" * 256, "dir/" * 2000, "a\0b", "a fox\nin the snow", "~nobody-here/x", "~", "~/" + "x" * 300,
    "..", "../" * 40, "/", "a/" + "b" * 300, "🦊" * 120, "\ud83d", "\udcff/x", " ", "", "CON", "a:b", "*?<>|", "\t",
    "a\rb",     "x" * 300 + ".safetensors", "\0.json", "y" * 300 + ".txt", "\ud83d.csv", "z" * 300 + ".py",
]  # fmt: skip


def asked(question: Any, *arguments: Any) -> Any:
    """The answer, or the name of the error of ours that it ends with."""
    try:
        return question(*arguments)
    except (AlignError, typer.BadParameter) as error:
        return type(error).__name__


@pytest.mark.usefixtures("place", "no_network")
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:20]))
def test_no_question_about_a_path_fails_on_any_text(text: str) -> None:
    assert exists(text) == (is_file(text) or is_folder(text))
    assert isinstance(expanded(text), Path)
    assert isinstance(is_model(text), bool)
    assert not is_bundled(text)
    questions: list[Any] = [on_hub, PromptSet.load, place_of, parse_reward, located, inspect_adapter, check_model]
    questions += [
        lambda t: find_pictures([Path(t)]),
        lambda t: SettingsFile.read(Path(t)),
        lambda t: check_out(Path(t)),
    ]
    questions += [check_place, AlignConfig.load, read_metrics, load_module]
    for question in questions:
        asked(question, text)
    with contextlib.suppress(OSError):  # a folder that is there and holds no model, as the stock class says it
        asked(AlignPropPipeline.from_pretrained, text)


COMMANDS = [
    ["train", "{}", "--reward", "brightness", "--prompt", "a dog", "--dry-run"],
    ["train", "--reward", "{}", "--dry-run"],
    ["train", "--prompts", "{}", "--dry-run"],
    ["train", "--config", "{}", "--dry-run"],
    ["train", "--import", "{}.py", "--dry-run"],
    ["sample", "--adapter", "{}", "a dog"],
    ["sample", "{}.safetensors", "a dog"],
    ["score", "{}", "--reward", "brightness"],
    ["score", "cats", "--reward", "brightness", "--prompts", "{}"],
    ["score", "cats", "--reward", "brightness", "--csv", "{}/x.csv"],
    ["mix", "{}=1", "--out", "b.safetensors"],
    ["mix", "{}", "--sweep", "0:1:1", "--out", "b.png"],
    ["export", "{}", "--to", "comfyui", "--out", "b.safetensors"],
    ["inspect", "{}"],
    ["push", "{}", "me/x"],
]


@pytest.mark.usefixtures("place", "no_network")
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_command_fails_on_a_text_that_is_no_path(words: list[str]) -> None:
    for text in ("a fox " * 50, "a\0b", "~nobody-here/x", "\udcff", "🦊" * 120):
        result = run(word.replace("{}", text) for word in words)
        assert result.exit_code in (1, 2), (text, result.output, result.exception)
        assert not [
            word
            for word in ("unexpected", "Errno", "codec", "embedded", "Value error", "Input should")
            if word in result.stderr
        ], text


def test_paths_are_asked_about_in_one_way() -> None:
    """pathlib raises for a text that no file system takes, so what a user wrote goes through sources.py."""
    asks = re.compile(r"\.expanduser\(|Path\([\w.\[\]]+\)\.(is_file|is_dir|exists)\(")
    root = Path(__file__).parents[1]
    files = [*root.glob("alignprop_pipe/**/*.py"), *root.glob("comfy_nodes/**/*.py")]
    found = [file.name for file in files if file.name != "sources.py" and asks.search(file.read_text(encoding="utf-8"))]
    assert found == []
