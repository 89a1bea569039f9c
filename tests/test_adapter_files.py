"""Files that come in are data that may lie: each is read whole, or is one AdapterError and changes nothing."""

import contextlib
import json
import os
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import made, miniature
from safetensors.torch import save, save_file

from alignprop_pipe import load_adapter
from alignprop_pipe.adapters import files
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.files import serialised
from alignprop_pipe.adapters.inspect import inspect_adapter
from alignprop_pipe.adapters.keys import MOST_RANK
from alignprop_pipe.errors import AdapterError

DOWN, UP = "unet.mid_block.attentions.0.proj_in.lora_A.weight", "unet.mid_block.attentions.0.proj_in.lora_B.weight"
PAIR = {DOWN: torch.ones(2, 4), UP: torch.ones(4, 2)}


def raw(described: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header: an object, or text."""
    text = described if isinstance(described, str) else json.dumps(described)
    content = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def entry(shape: Any, begin: int = 0, end: int = 0, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def refused(tmp_path: Path, content: bytes, match: str) -> None:
    file = tmp_path / "theirs.safetensors"
    file.write_bytes(content)
    with pytest.raises(AdapterError, match=match):
        Adapter.load(file)
    with pytest.raises(AdapterError, match=match):
        load_adapter(miniature("sd15"), file)
    assert not hasattr(miniature("sd15").unet, "peft_config")


# --- headers that lie ------------------------------------------------------------------------------------------------

HUGE = 10**15
LIES = {
    "nothing": (b"", "is empty: it has no bytes"),
    "four bytes": (b"\x01\0\0\0", "less than its header claims"),
    "a page": (b"<html><body>404</body></html>", "a web page"),
    "header longer than the file": (raw({}, length=10**6), "less than its header claims"),
    "header of 2**63": (raw({}, length=2**63), "less than its header claims"),
    "no JSON": (raw("{'a': 1}"), "cannot be read"),
    "no object": (raw("[]"), "no JSON object"),
    "not UTF-8": (struct.pack("<Q", 2) + b"\xff\xfe", "cannot be read"),
    "depth": (raw('{"a":' * 50_000), "cannot be read"),
    "10^15 elements": (raw({DOWN: entry([HUGE], 0, 4 * HUGE)}), "takes? .* bytes"),
    "10^15 elements, few bytes": (raw({DOWN: entry([HUGE], 0, 8)}, bytes(8)), "other bytes than its shape"),
    "shape beyond 64 bits": (raw({DOWN: entry([2**64, 2**64], 0, 8)}, bytes(8)), "no shape"),
    "zero times huge": (raw({DOWN: entry([0, 2**62]), UP: entry([2**62, 0])}), "do not fit|none of a LoRA"),
    "negative shape": (raw({DOWN: entry([-2, -2], 0, 16)}, bytes(16)), "no shape"),
    "shape of floats": (raw({DOWN: entry([2.0, 2], 0, 16)}, bytes(16)), "no shape"),
    "shape of truths": (raw({DOWN: entry([True, 4], 0, 16)}, bytes(16)), "no shape"),
    "shape is a number": (raw({DOWN: entry(4, 0, 16)}, bytes(16)), "no shape"),
    "many dimensions": (raw({DOWN: entry([1] * 100, 0, 4)}, bytes(4)), "no shape"),
    "NaN as an offset": (raw('{"a":{"dtype":"F32","shape":[1],"data_offsets":[NaN,4]}}', bytes(4)), "NaN"),
    "bytes before": (raw({DOWN: entry([1, 1], 4, 8)}, bytes(8)), "overlap|between"),
    "bytes behind": (raw({DOWN: entry([1, 1], 0, 4)}, bytes(8)), "take 4 bytes, and it holds 8"),
    "overlap": (raw({DOWN: entry([1, 2], 0, 8), UP: entry([2, 1], 4, 12)}, bytes(12)), "overlap"),
    "unknown number format": (raw({DOWN: entry([1, 1], 0, 4, dtype="F31")}, bytes(4)), "number format"),
    "number format is a list": (raw({DOWN: entry([1, 1], 0, 4, dtype=["F32"])}, bytes(4)), "number format"),
    "integers": (raw({DOWN: entry([1, 1], 0, 8, dtype="I64")}, bytes(8)), "'I64', which no adapter has"),
    "more fields": (raw({DOWN: entry([1, 1], 0, 4, url="https://example.org")}, bytes(4)), "not described by"),
    "an entry that is no object": (raw({DOWN: 1}), "not described by"),
    "metadata that is no object": (raw({"__metadata__": []}), "something else than texts"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "something else than texts"),
    "half a character": (raw('{"__metadata__":{"a":"\\ud800"}}'), "cannot be read|empty"),
    "a key twice": (raw('{"a":{},"a":{}}'), "'a' is in its header twice"),
    "no LoRA": (save({"down_blocks.0.weight": torch.ones(2, 2)}), "the weights of a denoiser"),
    "no names of anything": (save({"a.b": torch.ones(2, 2)}), "holds no LoRA: its first key"),
    "an alpha of two numbers": (save({**PAIR, DOWN.replace("lora_A.weight", "alpha"): torch.ones(2)}), "one number"),
    "rank 0": (raw({DOWN: entry([0, 4]), UP: entry([4, 0])}), "do not fit together"),
    "absurd rank": (save({DOWN: torch.ones(MOST_RANK + 1, 1), UP: torch.ones(1, MOST_RANK + 1)}), "has rank 8193"),
    "ranks that differ": (save({DOWN: torch.ones(2, 4), UP: torch.ones(4, 3)}), "do not fit together"),
    "half a pair": (save({DOWN: torch.ones(2, 4)}), "only down of its two matrices"),
    "NaN": (save({**PAIR, UP: torch.full((4, 2), torch.nan)}), "NaN or infinity"),
    "infinity": (save({**PAIR, UP: torch.full((4, 2), -torch.inf)}), "NaN or infinity"),
    "absurd alpha": (save({**PAIR, DOWN.replace("lora_A.weight", "alpha"): torch.tensor(1e38)}), "has alpha 1e\\+38"),
    "an alpha that is NaN": (save({**PAIR, DOWN.replace("lora_A.weight", "alpha"): torch.tensor(torch.nan)}), "NaN"),
    "an unknown key": (save({**PAIR, "unet.mid_block.extra": torch.ones(1)}), "no part of a plain LoRA"),
    "a DoRA": (save({**PAIR, DOWN.replace("lora_A.weight", "dora_scale"): torch.ones(4)}), "a DoRA, which is not"),
    "a LoHa": (save({**PAIR, "lora_unet_mid_block.hada_w1_a": torch.ones(2, 2)}), "a LoHa, which is not supported"),
    "the same layer twice": (
        save({
            **PAIR,
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 4),
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(4, 2),
        }),
        "are the same layer",
    ),
    "header of PEFT that is no number": (
        save(PAIR, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": float("nan")})}), "alpha",
    ),
    "families that are nested": (save({DOWN: torch.ones(2, 4)}, {"alignprop.families": "[" * 50_000}), "two matrices"),
    "header of PEFT that is nested": (save(PAIR, {"lora_adapter_metadata": "[" * 50_000}), "recursion|LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_one_clear_error(name: str, tmp_path: Path) -> None:
    refused(tmp_path, *LIES[name])


def test_nothing_is_allocated_for_a_claim(tmp_path: Path) -> None:
    """4 petabytes are claimed; the answer comes at once, and no larger buffer than the header is asked for."""
    file = tmp_path / "theirs.safetensors"
    with file.open("wb") as opened:
        opened.write(raw({DOWN: entry([HUGE], 0, 4 * HUGE)}))
        opened.truncate(10**12)  # a hole: nothing is on the disk
    began = time.monotonic()
    with pytest.raises(AdapterError, match="and it holds"):
        Adapter.load(file)
    assert time.monotonic() - began < 2


def test_a_whole_model_is_refused_before_it_is_read(tmp_path: Path) -> None:
    size = 10**12
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(raw({"model.diffusion_model.input_blocks.0.0.weight": entry([size // 4], 0, size)}))
        opened.truncate(opened.tell() + size)
    with pytest.raises(AdapterError, match="from_single_file"):
        Adapter.load(file)


def test_the_first_byte_of_a_pickle_may_be_the_length_of_a_header(tmp_path: Path) -> None:
    """0x80 0x02 begins a pickle, and is also 640 in the eight bytes of a length; `PK` is 19280."""
    for wanted in (0x280, 0x4B50):
        content = save(PAIR, {"note": ""})
        missing = wanted - struct.unpack("<Q", content[:8])[0]
        content = save(PAIR, {"note": " " * (missing // 8 * 8)})
        assert struct.unpack("<Q", content[:8])[0] == wanted
        (tmp_path / "mine.safetensors").write_bytes(content)
        assert Adapter.load(tmp_path / "mine.safetensors").metadata["note"].isspace()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_number_format_of_adapters_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({key: (tensor / 2).to(dtype) for key, tensor in PAIR.items()}, tmp_path / "a.safetensors")
    (factors,) = Adapter.load(tmp_path / "a.safetensors").layers["unet"].values()
    assert factors.up.dtype == (dtype if dtype.itemsize > 1 else torch.float16)
    assert bool((factors.up == 0.5).all())


def test_integers_may_be_alphas(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    pair = {f"{name}.lora_down.weight": PAIR[DOWN], f"{name}.lora_up.weight": PAIR[UP]}
    save_file({**pair, f"{name}.alpha": torch.tensor(4)}, tmp_path / "a.safetensors")
    (factors,) = Adapter.load(tmp_path / "a.safetensors").layers["unet"].values()
    assert (factors.alpha, factors.rank) == (4.0, 2)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing.safetensors", "x" * 5000, "a\0b", ""])
def test_no_such_file(name: str, tmp_path: Path) -> None:
    for read in (Adapter.load, inspect_adapter):
        with pytest.raises(AdapterError, match="no adapter file"):
            read(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """Opening one would wait for a writer for ever."""
    os.mkfifo(tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterError, match="no adapter file"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize("key", ["../../etc/x", "/tmp/x", "..\\x", "unet.../../x", "text_encoder_2/../../x"])
def test_names_in_a_file_never_become_paths(key: str, tmp_path: Path) -> None:
    tensors = {f"{key}.lora_A.weight": torch.ones(1, 2), f"{key}.lora_B.weight": torch.ones(2, 1)}
    header = {
        "modelspec.title": "../../title",
        "ss_output_name": "/tmp/name",
        "alignprop.families": json.dumps({key: "v1"}),
    }
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "theirs.safetensors").write_bytes(save(tensors, header))
    (tmp_path / "out").mkdir()
    with contextlib.suppress(AdapterError):
        Adapter.load(tmp_path / "in" / "theirs.safetensors").save(tmp_path / "out" / "mine.safetensors")
    written = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert written <= {"in/theirs.safetensors", "out/mine.safetensors", "out/mine-comfyui.safetensors"}


def test_an_adapter_with_a_component_that_is_a_path(tmp_path: Path) -> None:
    layers = made("sd15").layers
    with pytest.raises(AdapterError, match=r"'\.\./x', which is no name of a network"):
        Adapter({**layers, "../x": layers["unet"]}).save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_over_a_symlink_replaces_it_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "precious")
    made("sd15").save(tmp_path / "a.safetensors", format="diffusers")
    assert (tmp_path / "precious").read_text() == "keep"
    assert Adapter.load(tmp_path / "a.safetensors").layers


@pytest.mark.parametrize("name", ["os", "UNet2DConditionModel", "utils", "OnnxStableDiffusionPipeline", "__class__"])
def test_a_header_names_a_class_that_is_none(name: str, tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / "a.safetensors", {"alignprop.base_class": name, "alignprop.families": "[]"})
    assert Adapter.load(tmp_path / "a.safetensors").layers["unet"]


# --- pickles ---------------------------------------------------------------------------------------------------------


class Malicious:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_is_refused_and_read_where_it_is_allowed(tmp_path: Path) -> None:
    torch.save(PAIR, tmp_path / "theirs.bin")
    for read in (Adapter.load, inspect_adapter):
        with pytest.raises(AdapterError, match="is a pickle, which can run any program .*allow_pickle"):
            read(tmp_path / "theirs.bin")
    torch.save({"state_dict": PAIR}, tmp_path / "nested.bin")
    torch.save(PAIR, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("theirs.bin", "nested.bin", "old.bin"):
        (factors,) = Adapter.load(tmp_path / name, allow_pickle=True).layers["unet"].values()
        assert torch.equal(factors.up, PAIR[UP])
    assert inspect_adapter(tmp_path / "theirs.bin", allow_pickle=True).ranks == {2: 1}


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("allow", [False, True])
def test_a_malicious_pickle_does_nothing(write: Callable[..., Any], allow: bool, tmp_path: Path) -> None:
    write({**PAIR, "x": Malicious(tmp_path / "ran")}, tmp_path / "theirs.bin")
    with pytest.raises(AdapterError, match="pickle") as refusal:
        Adapter.load(tmp_path / "theirs.bin", allow_pickle=allow)
    assert "weights_only" not in str(refusal.value), "torch's advice is to run it"
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "theirs.bin", weights_only=False) if write is torch.save else pickle.loads(
        (tmp_path / "theirs.bin").read_bytes()
    )
    assert (tmp_path / "ran").exists(), "the pickle would have run"


def _stretched(path: Path) -> None:
    """10^15 elements over one number, by strides of zero."""
    torch.save({**PAIR, "unet.conv_in.lora_A.weight": torch.ones(1).expand(10**15)}, path)


def _compressed(path: Path) -> None:
    torch.save(PAIR, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _list(path: Path) -> None:
    torch.save([1, 2], path)


def _numbered(path: Path) -> None:
    torch.save({1: torch.ones(1)}, path)


def _texts(path: Path) -> None:
    torch.save({**PAIR, "name": "x"}, path)


def _sparse(path: Path) -> None:
    torch.save({**PAIR, DOWN: torch.ones(2, 4).to_sparse()}, path)


def _integers(path: Path) -> None:
    torch.save({**PAIR, DOWN: torch.ones(2, 4, dtype=torch.int64)}, path)


def _cut(path: Path) -> None:
    torch.save(PAIR, path)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("write", [_stretched, _compressed, _list, _numbered, _texts, _sparse, _integers, _cut])
def test_other_pickles_are_one_error(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "theirs.bin")
    with pytest.raises(AdapterError, match="is a pickle that holds more than weights, or is damaged"):
        Adapter.load(tmp_path / "theirs.bin", allow_pickle=True)


# --- fuzzing ---------------------------------------------------------------------------------------------------------


def _small(family: str, form: str) -> bytes:
    """A file of few layers, so that a mutation hits something."""
    whole = made(family, ranks=(1, 2), text=family == "sd15")
    few = {name: dict(list(layers.items())[:3]) for name, layers in whole.layers.items()}
    adapter = Adapter(few, whole.base)
    tensors = {"kohya": adapter.kohya_tensors, "comfyui": adapter.comfyui_tensors, "diffusers": lambda: dict(adapter)}
    return serialised(tensors[form](), {"alignprop.note": "mine"}, torch.float16)


SEEDS = [_small("sd15", "diffusers"), _small("sd15", "kohya"), _small("flux", "kohya"), _small("wan", "comfyui")]
ODD = [
    None, True, -1, 0, 2**31, 2**63, 10**400, 1.5, "", "F32", "\0", "../x", "x" * 300, [], [[]], {}, [1, 2],
    [0, 10**15], "unet", "alpha", "nan",
]  # fmt: skip
NAMES = [
    "unet.", "lora_unet_", "lora_te_", "lora_te2_", "transformer.", "diffusion_model.blocks.0.", "base_model.model.",
    "double_blocks_0_img_attn_qkv", "blocks_0_self_attn_q", ".alpha", ".lora_A.weight", ".lora_up.weight", ".diff",
    ".dora_scale", "_lora.down.weight", ".processor.", "input_blocks_1_1_", "text_encoder.", "..", "/", "é",
]  # fmt: skip
HEADERS = ["lora_adapter_metadata", "alignprop.families", "alignprop.base_class", "ss_v2", "alignprop.window", "format"]
CLASSES = ["FluxPipeline", "WanPipeline", "StableDiffusionXLPipeline", "os", "[" * 2000, '{"unet": 1}', "{}", "1e999"]


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:start]), content[start:]


def _random_bytes(rng: random.Random, _: bytes) -> bytes:
    start = rng.choice([b"", struct.pack("<Q", rng.randrange(64)) + b"{", b"PK\x03\x04", b"\x80\x02"])
    return start + rng.randbytes(rng.randrange(200))


def _truncated(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))] + bytes(rng.choice([0, 0, 7]))


def _flipped(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _spliced(rng: random.Random, content: bytes) -> bytes:
    place, piece = rng.randrange(len(content)), rng.choice(SEEDS)
    begin = rng.randrange(len(piece))
    return content[:place] + piece[begin : begin + rng.randrange(40)] + content[place + rng.randrange(40) :]


def _other_entry(rng: random.Random, content: bytes) -> bytes:
    described, data = _split(content)
    key = rng.choice([key for key in described if key != "__metadata__"])
    entry = described[key]
    name = rng.choice(["dtype", "shape", "data_offsets", "more"])
    if name in ("shape", "data_offsets") and rng.random() < 0.6:
        entry[name][rng.randrange(len(entry[name]) or 1) if entry[name] else 0 :] = [rng.choice(ODD)]
    else:
        entry[name] = rng.choice(ODD)
    return raw(described, data)


def _other_names(rng: random.Random, content: bytes) -> bytes:
    described, data = _split(content)
    keys = [key for key in described if key != "__metadata__"]
    for key in rng.sample(keys, rng.choice([1, 1, 2, len(keys)])):
        cut = rng.randrange(len(key))
        name = rng.choice([rng.choice(NAMES) + key, key + rng.choice(NAMES), key[:cut] + rng.choice(NAMES) + key[cut:]])
        described[name] = described.pop(key)
    return raw(described, data)


def _other_shapes(rng: random.Random, content: bytes) -> bytes:
    """The same number of elements, differently laid."""
    described, data = _split(content)
    for key, entry in described.items():
        if key != "__metadata__" and rng.random() < 0.5:
            entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]]])
    return raw(described, data)


def _other_header(rng: random.Random, content: bytes) -> bytes:
    described, data = _split(content)
    described["__metadata__"][rng.choice(HEADERS)] = rng.choice(
        [*CLASSES, json.dumps({"unet.lora_alpha": rng.choice(ODD)})]
    )
    return raw(described, data)


def _dropped(rng: random.Random, content: bytes) -> bytes:
    """A tensor less, and the others moved up, so that only the pairs are broken."""
    described, data = _split(content)
    gone = described.pop(rng.choice([key for key in described if key != "__metadata__"]))
    begin, end = gone["data_offsets"]
    for key, entry in described.items():
        if key != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [place - (end - begin) for place in entry["data_offsets"]]
    return raw(described, data[:begin] + data[end:])


MUTATIONS = [
    _random_bytes, _truncated, _flipped, _flipped, _spliced, _other_entry, _other_names, _other_names, _other_shapes,
    _other_header, _dropped,
]  # fmt: skip


def _fuzzed(count: int, seed: int, folder: Path) -> tuple[int, int]:
    """How many inputs were read and how many refused; the slowest took less than a second."""
    rng = random.Random(seed)
    pipe = miniature("sd15")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    file, read, refused = folder / "fuzzed.safetensors", 0, 0
    for number in range(count):
        content = rng.choice(MUTATIONS)(rng, rng.choice(SEEDS))
        file.write_bytes(content)
        began = time.monotonic()
        try:
            adapter = Adapter.load(file, allow_pickle=number % 7 == 0)
            assert all(f.rank == f.up.shape[1] for layers in adapter.layers.values() for f in layers.values())
            read += 1
        except AdapterError:
            refused += 1
            if number % 20 == 0:
                with pytest.raises(AdapterError):
                    load_adapter(pipe, file)
        assert time.monotonic() - began < 5, content
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    return read, refused


def test_fuzzed_files_are_read_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read, refused = _fuzzed(1500, 1, tmp_path)
    assert read > 100, "mutations that leave a LoRA are among them"
    assert refused > 700


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 7))
def test_ten_thousand_fuzzed_files(seed: int, tmp_path: Path) -> None:
    read, refused = _fuzzed(2000, seed, tmp_path)
    assert read > 100
    assert refused > 1000


def test_the_seeds_of_the_fuzzer_are_whole(tmp_path: Path) -> None:
    for content in SEEDS:
        (tmp_path / "seed.safetensors").write_bytes(content)
        assert Adapter.load(tmp_path / "seed.safetensors").layers


def test_the_reader_keeps_numbers_that_are_not_finite_where_it_is_asked_to(tmp_path: Path) -> None:
    save_file({**PAIR, UP: torch.full((4, 2), torch.inf)}, tmp_path / "a.safetensors")
    tensors, _ = files.read_file(tmp_path / "a.safetensors", finite=False)
    assert bool(torch.isinf(tensors[UP]).all())


def test_tensors_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    """The library's own order is another one in each process, and reports would begin with another layer each time."""
    keys = [f"unet.mid_block.layer_{number}.lora_A.weight" for number in range(40)]
    (tmp_path / "a.safetensors").write_bytes(save({key: torch.ones(2, 4) for key in reversed(keys)}))
    tensors, _ = files.read_file(tmp_path / "a.safetensors")
    assert list(tensors) == sorted(keys)


def test_a_number_format_that_is_too_small_is_named() -> None:
    with pytest.raises(AdapterError, match=r"does not fit into torch\.float16"):
        serialised({UP: torch.tensor(1e6)}, {"format": "pt"}, torch.float16)
