"""Mixes against numpy on the raw tensors of the saved files, against PEFT's own weighting, and against a full SVD."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import sd15, sdxl
from random_adapters import draw, factors_for, random_adapter
from safetensors.numpy import load_file
from torch import nn

from alignprop_pipe import mix
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.apply import load_adapter, read_metadata
from alignprop_pipe.adapters.factors import Factors
from alignprop_pipe.adapters.header import Base
from alignprop_pipe.adapters.mix import Energy, name_of
from alignprop_pipe.diffusion.lora import attention_linears
from alignprop_pipe.errors import AdapterError

PIPE = sd15()
"""Never written to: it says which layers there are, and how large."""

CONVOLUTIONS = [path for path, layer in PIPE.unet.named_modules() if isinstance(layer, nn.Conv2d)]
LAYERS = [*attention_linears(PIPE.unet)[:3], CONVOLUTIONS[1], CONVOLUTIONS[2]]
BASE = Base(base_model="me/model", base_class="StableDiffusionPipeline", families={"unet": "v1"})


def an_adapter(
    shapes: dict[str, tuple[int, float]], seed: int, dtype: torch.dtype = torch.float32, base: Base = BASE
) -> Adapter:
    """Random factors for layers of the miniature, each with its rank and alpha."""
    generator = torch.Generator().manual_seed(seed)
    made = {p: factors_for(PIPE.unet.get_submodule(p), r, a, generator) for p, (r, a) in shapes.items()}
    layers = {path: Factors(f.down.to(dtype), f.up.to(dtype), f.alpha) for path, f in made.items()}
    return Adapter({"unet": layers}, base)


def changes(file: Path) -> dict[str, np.ndarray]:
    """Every layer's weight change in float64, by numpy from the raw tensors of a kohya file: 2D."""
    tensors = {key: value.astype(np.float64) for key, value in load_file(file).items()}
    found = {}
    for key, down in tensors.items():
        name, lora, _ = key.partition(".lora_down.weight")
        if lora:
            up, alpha = tensors[f"{name}.lora_up.weight"], float(tensors[f"{name}.alpha"])
            rank = down.shape[0]
            found[name] = up.reshape(-1, rank) @ down.reshape(rank, -1) * alpha / rank
    return found


def saved_changes(adapter: Adapter, folder: Path, name: str) -> dict[str, np.ndarray]:
    return changes(adapter.save(folder / f"{name}.safetensors", format="kohya")[0])


def weighted_sum(parts: list[tuple[dict[str, np.ndarray], float]]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for layers, weight in parts:
        for name, change in layers.items():
            found[name] = found.get(name, 0.0) + weight * change
    return found


def assert_changes(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], atol: float = 1e-6) -> None:
    """What is missing has to be zero."""
    assert got.keys() <= wanted.keys()
    for name, change in wanted.items():
        np.testing.assert_allclose(got.get(name, np.zeros_like(change)), change, atol=atol, rtol=0)


# --- exact -------------------------------------------------------------------------------------------------------

SHAPES = st.dictionaries(
    st.sampled_from(LAYERS), st.tuples(st.integers(1, 6), st.sampled_from([0.25, 1.0, 3.0, 7.5])), min_size=1
)
WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-2, 2))


@given(parts=st.lists(st.tuples(SHAPES, WEIGHTS), min_size=1, max_size=4))
@settings(max_examples=25)
def test_the_weight_change_is_the_weighted_sum(
    parts: list[tuple[dict[str, tuple[int, float]], float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    adapters = [an_adapter(shapes, seed) for seed, (shapes, _) in enumerate(parts)]
    raw = [saved_changes(adapter, folder, f"part{number}") for number, adapter in enumerate(adapters)]
    wanted = weighted_sum([(one, weight) for one, (_, weight) in zip(raw, parts, strict=True)])
    mixed = mix([(adapter, weight) for adapter, (_, weight) in zip(adapters, parts, strict=True)])
    assert_changes(saved_changes(mixed, folder, "mixed"), wanted)
    from_files = mix([(folder / f"part{number}.safetensors", weight) for number, (_, weight) in enumerate(parts)])
    assert_changes(saved_changes(from_files, folder, "again"), wanted)


def test_both_files_of_a_mix_hold_the_sum(tmp_path: Path) -> None:
    shapes = dict.fromkeys(LAYERS, (2, 3.0))
    one, two = an_adapter(shapes, 1), an_adapter(shapes, 2)
    wanted = weighted_sum([(saved_changes(one, tmp_path, "one"), 0.6), (saved_changes(two, tmp_path, "two"), -0.4)])
    diffusers, kohya = mix([(one, 0.6), (two, -0.4)]).save(tmp_path / "mixed.safetensors")
    assert_changes(changes(kohya), wanted)
    tensors = load_file(diffusers)
    for path in LAYERS:
        down, up = tensors[f"unet.{path}.lora_A.weight"], tensors[f"unet.{path}.lora_B.weight"]
        assert down.shape[0] == 4
        product = up.reshape(-1, 4).astype(np.float64) @ down.reshape(4, -1)
        np.testing.assert_allclose(product, wanted[f"lora_unet_{path.replace('.', '_')}"], atol=1e-6, rtol=0)


def test_a_weight_of_one_alone_changes_no_bit() -> None:
    one, two = (an_adapter(dict.fromkeys(LAYERS, (3, 5.0)), seed) for seed in (1, 2))
    for mixed in (mix([(one, 1.0)]), mix([(one, 1.0), (two, 0.0)]), mix([(two, 0.0), (one, 1.0)])):
        assert mixed.keys() == one.keys()
        for path, factors in one.layers["unet"].items():
            got = mixed.layers["unet"][path]
            assert got.alpha == factors.alpha
            assert torch.equal(got.down, factors.down)
            assert torch.equal(got.up, factors.up)


def test_the_same_adapter_twice(tmp_path: Path) -> None:
    one = an_adapter(dict.fromkeys(LAYERS, (3, 5.0)), 1)
    once = saved_changes(one, tmp_path, "one")
    assert_changes(saved_changes(mix([(one, 0.75), (one, 0.5)]), tmp_path, "more"), weighted_sum([(once, 1.25)]))
    gone = saved_changes(mix([(one, 1.0), (one, -1.0)]), tmp_path, "gone")
    assert_changes(gone, weighted_sum([(once, 0.0)]))


def test_only_zeros_are_an_adapter_that_changes_nothing(tmp_path: Path) -> None:
    one, two = (an_adapter(dict.fromkeys(LAYERS, (3, 5.0)), seed) for seed in (1, 2))
    got = saved_changes(mix([(one, 0.0), (two, 0.0)]), tmp_path, "none")
    assert got
    assert all(not change.any() for change in got.values())


def test_mixing_goes_on_from_a_mix(tmp_path: Path) -> None:
    parts = [an_adapter(dict.fromkeys(LAYERS[seed:], (seed + 1, 3.0)), seed) for seed in range(3)]
    raw = [saved_changes(part, tmp_path, str(number)) for number, part in enumerate(parts)]
    inner = mix([(parts[0], 0.5), (parts[1], 0.25)])
    wanted = weighted_sum([(raw[0], 1.0), (raw[1], 0.5), (raw[2], -1.0)])
    assert_changes(saved_changes(mix([(inner, 2.0), (parts[2], -1.0)]), tmp_path, "mixed"), wanted)


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float16, torch.float32], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
    ],
)
def test_16_bits_are_not_enough_to_be_exact(dtypes: list[torch.dtype], wanted: torch.dtype) -> None:
    parts = [an_adapter({LAYERS[0]: (2, 3.0)}, seed, dtype) for seed, dtype in enumerate(dtypes)]
    factors = mix([(parts[0], 0.3), (parts[1], 0.7)]).layers["unet"][LAYERS[0]]
    assert factors.down.dtype == factors.up.dtype == wanted
    each = [part.layers["unet"][LAYERS[0]] for part in parts]
    exact = sum(w * (f.up.double() @ f.down.double()) * f.alpha / f.rank for f, w in zip(each, (0.3, 0.7), strict=True))
    torch.testing.assert_close((factors.up @ factors.down).double(), exact, atol=1e-6, rtol=0)


def test_components_that_only_one_has(tmp_path: Path) -> None:
    """Text encoders next to the UNet, as kohya's files for SDXL have them."""
    pipe = sdxl()
    one = random_adapter(pipe, seed=1)
    path = next(name for name, _ in pipe.text_encoder.named_modules() if name.endswith("q_proj"))
    text = {path: factors_for(pipe.text_encoder.get_submodule(path), 2, 1.0, torch.Generator().manual_seed(2))}
    two = Adapter({"text_encoder": text}, one.base)
    mixed = mix([(one, 0.5), (two, 2.0)])
    assert mixed.layers.keys() == {"unet", "text_encoder"}
    torch.testing.assert_close(mixed.layers["text_encoder"][path].up, 2 * text[path].up)
    load_adapter(pipe, mixed.save(tmp_path / "mixed.safetensors", format="diffusers")[0])


# --- on a pipeline -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # of PEFT, for every second adapter
def test_pictures_are_those_of_pefts_own_weights(tmp_path: Path) -> None:
    """Stock diffusers with both adapters active and weighted, against our one file."""
    pipe = sd15()
    every = [path for path in attention_linears(pipe.unet) if "attn1" in path]
    some = [path for path in attention_linears(pipe.unet) if "to_q" in path]
    one = random_adapter(pipe, rank=2, alpha=3.0, seed=1, paths=lambda _: every)
    two = random_adapter(pipe, rank=4, alpha=2.0, seed=2, paths=lambda _: some)
    base = draw(pipe)
    for name, adapter in (("one", one), ("two", two)):
        pipe.load_lora_weights(str(adapter.save(tmp_path / f"{name}.safetensors")[0]), adapter_name=name)
    ours = sd15()
    for weights in ([0.6, 0.4], [1.0, -0.5], [0.0, 1.0]):
        pipe.set_adapters(["one", "two"], weights)
        wanted = draw(pipe)
        assert (wanted - base).abs().max() > 1e-3
        load_adapter(ours, mix([(one, weights[0]), (two, weights[1])]))
        torch.testing.assert_close(draw(ours), wanted, atol=1e-5, rtol=0)


# --- compressed --------------------------------------------------------------------------------------------------


@given(ranks=st.lists(st.integers(1, 4), min_size=2, max_size=3), rank=st.integers(1, 12), path=st.sampled_from(LAYERS))
@settings(max_examples=25)
def test_compression_is_numpys_svd_of_the_full_matrix(
    ranks: list[int], rank: int, path: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("svd")
    parts = [(an_adapter({path: (one, 3.0)}, seed), 0.7) for seed, one in enumerate(ranks)]
    (exact,) = saved_changes(mix(parts), folder, "exact").values()
    mixed = mix(parts, rank=rank)
    (got,) = saved_changes(mixed, folder, "small").values()
    assert mixed.layers["unet"][path].rank == min(rank, sum(ranks), *exact.shape)
    left, values, right = np.linalg.svd(exact, full_matrices=False)
    wanted = left[:, :rank] * values[:rank] @ right[:rank]
    if rank >= sum(ranks) or values[rank - 1] - values[rank] > 1e-3:  # else two of the kind change places
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)
    energy = Energy.of(mixed)
    assert energy is not None
    share = np.square(values[:rank]).sum() / np.square(values).sum()
    assert energy.total == pytest.approx(share, abs=1e-6)
    assert energy.layers == {f"unet.{path}": pytest.approx(share, abs=1e-6)}


def test_energy_in_all_is_weighted_by_the_layers() -> None:
    parts = [(an_adapter(dict.fromkeys(LAYERS, (3, 5.0)), seed), 1.0) for seed in (1, 2)]
    mixed, exact = mix(parts, rank=2), mix(parts)
    energy = Energy.of(mixed)
    assert energy is not None
    sizes = {f"unet.{path}": factors.norm() ** 2 for path, factors in exact.layers["unet"].items()}
    assert energy.layers.keys() == sizes.keys()
    kept = sum(energy.layers[name] * size for name, size in sizes.items())
    assert energy.total == pytest.approx(kept / sum(sizes.values()), abs=1e-6)
    assert 0.3 < energy.total < 1
    assert {factors.rank for factors in mixed.layers["unet"].values()} == {2}


def test_full_rank_loses_nothing_and_zero_is_all_of_it(tmp_path: Path) -> None:
    one = an_adapter(dict.fromkeys(LAYERS, (3, 5.0)), 1)
    for rank in (6, 7, 10_000):
        mixed = mix([(one, 0.5), (one, 0.25)], rank=rank)
        assert_changes(
            saved_changes(mixed, tmp_path, str(rank)), weighted_sum([(saved_changes(one, tmp_path, "one"), 0.75)])
        )
        assert Energy.of(mixed) == Energy(1.0, {f"unet.{path}": 1.0 for path in LAYERS})
    # The sum has rank 3 only: nothing is lost there either.
    half = mix([(one, 0.5), (one, 0.25)], rank=3)
    wanted = weighted_sum([(saved_changes(one, tmp_path, "one"), 0.75)])
    assert_changes(saved_changes(half, tmp_path, "3"), wanted, atol=1e-5)
    assert Energy.of(half) == Energy(1.0, {f"unet.{path}": 1.0 for path in LAYERS})
    nothing = Energy.of(mix([(one, 1.0), (one, -1.0)], rank=2))
    assert nothing is not None
    assert all(0 <= share <= 1 for share in (nothing.total, *nothing.layers.values()))


def test_the_full_matrix_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of 30,000 x 30,000 would be 14 GB."""
    wide = Factors(torch.randn(2, 30_000), torch.randn(30_000, 2), 2.0)
    adapter = Adapter({"unet": {"mid": wide}}, BASE)
    largest = 0
    cat = torch.linalg.svd

    def watched(matrix: torch.Tensor, **kwargs: Any) -> Any:
        nonlocal largest
        largest = max(largest, matrix.numel())
        return cat(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    mixed = mix([(adapter, 0.5), (adapter, 0.25)], rank=2)
    assert mixed.layers["unet"]["mid"].rank == 2
    assert largest == 16


# --- what is said of it ------------------------------------------------------------------------------------------


def test_metadata_says_what_was_mixed_and_no_path(tmp_path: Path) -> None:
    home = tmp_path / "jane"
    one, two = (an_adapter({LAYERS[0]: (2, 1.0)}, seed) for seed in (1, 2))
    (home / "runs" / "foxes").mkdir(parents=True)
    one.save(home / "runs" / "foxes" / "adapter.safetensors", format="diffusers", reward="clip - jpeg", step="7")
    two.save(home / "colours.safetensors", format="diffusers", reward="colour")
    mixed = mix({home / "runs" / "foxes": 0.6, home / "colours.safetensors": -0.4}, rank=1)
    file, _ = mixed.save(tmp_path / "mixed.safetensors")
    header = read_metadata(file)
    assert json.loads(header["mix.parts"]) == [
        {"adapter": "foxes", "weight": 0.6, "reward": "clip - jpeg"},
        {"adapter": "colours", "weight": -0.4, "reward": "colour"},
    ]
    assert header["alignprop.base_model"] == "me/model"
    assert "alignprop.reward" not in header
    assert "alignprop.step" not in header
    assert "jane" not in json.dumps(header)
    assert Energy.of(Adapter.load(file)) == Energy.of(mixed)


def test_what_all_parts_share_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = (an_adapter({LAYERS[0]: (2, 1.0)}, seed) for seed in (1, 2))
    one = Adapter(one.layers, one.base, {"reward": "clip", "window": "0.0-0.5"})
    (file,) = two.save(tmp_path / "two.safetensors", format="kohya", reward="clip", window="0.0-0.5")
    mixed = mix([(one, 0.5), (file, 0.5)])
    assert (mixed.metadata["reward"], mixed.metadata["window"]) == ("clip", "0.0-0.5")
    assert not caplog.records
    mixed = mix([(one, 0.5), (two, 0.5)])
    assert "window" not in mixed.metadata
    assert "every step" in caplog.text


def test_names(tmp_path: Path) -> None:
    assert name_of(tmp_path / "a=b.safetensors") == "a=b"
    assert name_of("me/foxes") == "foxes"
    for name in ("adapter.safetensors", "config.json", "metrics.jsonl"):
        (tmp_path / name).touch()
    assert name_of(tmp_path / "adapter.safetensors") == name_of(tmp_path) == tmp_path.name
    assert name_of(an_adapter({LAYERS[0]: (1, 1.0)}, 0), 2) == "adapter 2"


# --- what cannot be mixed ----------------------------------------------------------------------------------------


def of(base: Base, path: str = LAYERS[0]) -> Adapter:
    return an_adapter({path: (2, 1.0)}, 1, base=base)


@pytest.mark.parametrize(
    ("left", "right", "both"),
    [
        (Base("me/a"), Base("me/b"), ("me/a", "me/b")),
        (Base(families={"unet": "v1"}), Base(families={"unet": "xl"}), ("v1", "xl")),
        (Base("me/a", families={"unet": "v2"}), Base(families={"unet": "v1"}), ("me/a", "v1")),
        (
            Base(families={"unet": "v1"}),
            Base(families={"transformer": "FluxTransformer2DModel"}),
            ("v1", "FluxTransformer2DModel"),
        ),
    ],
)
def test_other_base_models_are_an_error_that_names_both(left: Base, right: Base, both: tuple[str, str]) -> None:
    for one, two in ((left, right), (right, left)):
        with pytest.raises(AdapterError, match="one base model") as caught:
            mix([(of(one), 0.5), (of(two, LAYERS[1]), 0.5)])
        assert all(name in str(caught.value) for name in both)
    with pytest.raises(AdapterError, match="one base model"):
        mix([(of(left), 0.5), (of(Base()), 0.5), (of(right), 0.0)])


def test_other_shapes_are_an_error_that_names_both() -> None:
    narrow, wide = (Factors(torch.ones(2, n), torch.ones(8, 2), 2.0) for n in (4, 6))
    with pytest.raises(AdapterError, match="8x4.*8x6") as caught:
        mix([(Adapter({"unet": {"mid": narrow}}), 0.5), (Adapter({"unet": {"mid": wide}}), 0.5)])
    assert "'adapter 1'" in str(caught.value)
    assert "'adapter 2'" in str(caught.value)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Base("me/a"), Base()),
        (Base("me/a", "StableDiffusionPipeline"), Base("me/a", "StableDiffusionImg2ImgPipeline")),
        (
            Base(families={"transformer": "WanTransformer3DModel"}),
            Base(families={"transformer_2": "WanTransformer3DModel"}),
        ),
    ],
)
def test_what_may_be_of_one_model_is_mixed(left: Base, right: Base) -> None:
    mixed = mix([(of(left), 0.5), (of(right), 0.5)])
    assert mixed.base.base_model == left.base_model
    assert mixed.base.families == {**left.families, **right.families}


GOOD = an_adapter({LAYERS[0]: (2, 1.0)}, 1)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], r"\(a, 0\.6\)"),
        ({}, r"\(a, 0\.6\)"),
        (GOOD, r"\(a, 0\.6\)"),
        ("a.safetensors", r"\(a, 0\.6\)"),
        (None, r"\(a, 0\.6\)"),
        ([GOOD, GOOD], "part 1 is"),
        ([(GOOD, 0.5), (3, 0.5)], "part 2 is"),
        ([(GOOD, 0.5, 0.5)], "part 1 is"),
        ([(GOOD, "0.5")], "weight of part 1 is '0.5'"),
        ([(GOOD, 0.5), (GOOD, math.nan)], "weight of part 2 is nan"),
        ([(GOOD, math.inf)], "such as 0.6"),
        ([(GOOD, True)], "such as 0.6"),
        ([("nowhere.safetensors", 0.5)], "no adapter file"),
        ([(GOOD, 1e300)], "smaller weights"),
        ([(Adapter({}), 1.0)], "empty"),
        ([(Adapter({"unet": {"mid": Factors(torch.ones(2, 4), torch.ones(4, 3), 1.0)}}), 1.0)], "unet.mid.*no LoRA"),
        ([(Adapter({"unet": {"mid": Factors(torch.ones(2), torch.ones(4), 1.0)}}), 1.0)], "unet.mid.*no LoRA"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_parts(parts: Any, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        mix(parts)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rank", [0, -1, 1.5, "4", True])
def test_wrong_ranks(rank: Any) -> None:
    with pytest.raises(AdapterError, match="whole number"):
        mix([(GOOD, 1.0)], rank=rank)


def _text(path: Path) -> None:
    path.write_text("<html>404</html>")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("damage", [_text, _cut])
def test_a_damaged_file_is_one_error(damage: Callable[[Path], None], tmp_path: Path) -> None:
    (file,) = GOOD.save(tmp_path / "a.safetensors", format="kohya")
    damage(file)
    with pytest.raises(AdapterError, match=r"a\.safetensors"):
        mix([(GOOD, 0.5), (file, 0.5)])


@pytest.mark.parametrize("text", ["{", "[]", '{"total": "x", "layers": {}}', '{"total": 1.0, "layers": [1]}', "3"])
def test_a_damaged_energy_is_an_error(text: str) -> None:
    with pytest.raises(AdapterError, match="mix the adapters again"):
        Energy.of(Adapter(GOOD.layers, GOOD.base, {"mix.energy": text}))
    assert Energy.of(GOOD) is None
