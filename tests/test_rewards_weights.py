"""Weight files: found or refused in words, tensors only, whole or not at all; a pickle is converted once."""

import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards.networks import weights
from alignprop_pipe.rewards.networks.weights import load_into, load_tensors, locate

NAMES = ("head.safetensors", "head.pth")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Converted files go to a folder of the test's own."""
    cache = tmp_path / "assets"
    monkeypatch.setattr(weights, "cached_assets_path", lambda *names: cache)
    cache.mkdir()
    return cache


def state() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in nn.Linear(3, 2).state_dict().items()}


class Malicious:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# --- where files are ---


def test_a_file_is_itself(tmp_path):
    path = tmp_path / "any.bin"
    path.touch()
    assert locate(str(path), NAMES) == path


def test_a_folder_gives_its_first_file_of_the_list(tmp_path):
    (tmp_path / "head.pth").touch()
    assert locate(str(tmp_path), NAMES) == tmp_path / "head.pth"
    (tmp_path / "head.safetensors").touch()
    assert locate(str(tmp_path), NAMES) == tmp_path / "head.safetensors"


def test_a_folder_without_them_says_what_it_holds(tmp_path):
    (tmp_path / "other.txt").touch()
    with pytest.raises(RewardError, match=r"lacks head.safetensors or head.pth; it holds: .*other.txt"):
        locate(str(tmp_path), NAMES)


def test_offline_the_error_lists_the_files_and_the_command_that_gets_them():
    with pytest.raises(RewardError) as caught:
        locate("someone/some-head", NAMES, revision="v2")
    assert "head.safetensors or head.pth" in str(caught.value)
    assert "hf download someone/some-head head.safetensors --revision v2 --local-dir FOLDER" in str(caught.value)


# --- what is in them ---


def test_safetensors_are_read_as_they_are(tmp_path):
    wanted = state()
    save_file(wanted, tmp_path / "a.safetensors")
    got = load_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("wrap", [lambda held: held, lambda held: {"state_dict": held}, lambda held: {"model": held}])
def test_a_pickle_of_tensors_is_converted_once(tmp_path, own_cache, wrap, monkeypatch):
    wanted = state()
    torch.save(wrap(wanted), tmp_path / "a.pth")
    assert all(torch.equal(load_tensors(tmp_path / "a.pth")[name], wanted[name]) for name in wanted)
    assert len(list(own_cache.glob("*.safetensors"))) == 1
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("the pickle was opened again"))
    assert all(torch.equal(load_tensors(tmp_path / "a.pth")[name], wanted[name]) for name in wanted)


def test_a_changed_pickle_is_converted_anew(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.zeros(2)}, path)
    load_tensors(path)
    torch.save({"weight": torch.ones(300)}, path)
    assert load_tensors(path)["weight"].sum() == 300


def test_a_malicious_pickle_runs_nothing(tmp_path, own_cache):
    harm = tmp_path / "harm"
    torch.save({"weight": torch.zeros(2), "more": Malicious(harm)}, tmp_path / "a.pth")
    with pytest.raises(RewardError, match="can run code: it was not opened"):
        load_tensors(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Malicious(harm)))
    with pytest.raises(RewardError):
        load_tensors(tmp_path / "b.pth")
    assert not harm.exists()
    assert not list(own_cache.iterdir())


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_truncated_file_is_named(tmp_path, own_cache, name):
    path = tmp_path / name
    save = torch.save if name.endswith("pth") else save_file
    save(state(), path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(RewardError, match=rf"{re.escape(name)}.*(damaged|not opened)"):
        load_tensors(path)
    assert not list(own_cache.iterdir())


@pytest.mark.parametrize("held", [[1, 2], {}, {"step": 3}])
def test_a_pickle_without_tensors_is_refused(tmp_path, held):
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(RewardError, match="holds no weights"):
        load_tensors(tmp_path / "a.pth")


# --- into a network: all or nothing ---


def test_weights_go_in(tmp_path):
    network, wanted = nn.Linear(3, 2), state()
    load_into(network, wanted, "here")
    assert torch.equal(network.weight, wanted["weight"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bias": None}, "bias is missing"),
        ({"more": torch.zeros(1)}, "more is not known"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\), not \(2,\)"),
        ({"bias": torch.tensor([0.0, torch.nan])}, "bias holds numbers that are not finite"),
    ],
)
def test_a_misfit_is_named_and_leaves_the_network_alone(change, said):
    network = nn.Linear(3, 2)
    before = network.weight.detach().clone()
    tensors = {name: tensor for name, tensor in {**state(), **change}.items() if tensor is not None}
    with pytest.raises(RewardError, match=said):
        load_into(network, tensors, "here")
    assert torch.equal(network.weight, before)


def test_what_is_left_over_can_be_allowed():
    load_into(nn.Linear(3, 2), {**state(), "position_ids": torch.zeros(1)}, "here", ignored=("position",))


def test_offline_a_file_that_was_loaded_before_is_found(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    repository = tmp_path / "models--someone--some-head"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "head.pth").touch()
    assert locate("someone/some-head", NAMES) == snapshot / "head.pth"
