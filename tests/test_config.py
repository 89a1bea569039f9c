"""`AlignConfig`: every field, its range, its text; files without loss; errors that name the way out."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignprop_pipe.config.choices import (
    Checkpointing,
    Hinge,
    KeepSteps,
    Loss,
    Maximize,
    RecomputeAll,
    RecomputeNone,
    Target,
    checkpointing_from_text,
    loss_from_text,
)
from alignprop_pipe.config.settings import (
    FIELD_PATHS,
    PARTS,
    PRESETS,
    AlignConfig,
    EvaluationOptions,
    LoraOptions,
    OptimizerOptions,
    SamplingOptions,
    leaves,
    value_from,
)
from alignprop_pipe.config.truncation import FullBackprop, LastK, RandomLastK, Truncation, truncation_from_text
from alignprop_pipe.errors import AlignError, ConfigError

# --- strategies: every field over its whole range ------------------------------------------------------------------


@st.composite
def random_last_k(draw: st.DrawFn) -> RandomLastK:
    low = draw(st.integers(1, 2000))
    return RandomLastK(low, draw(st.none() | st.integers(low, 4000)))


positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
not_negative = st.floats(min_value=0, allow_infinity=False)
finite = st.floats(allow_nan=False, allow_infinity=False)
naturals = st.integers(0, 10**12)
counts = st.integers(1, 10**12)
texts = st.text(max_size=20) | st.sampled_from(['"', "\\", "'''", "\x7f", "\x00", "\r\n", "# no", "🐶 é", "\u2028"])
truncations = st.just(FullBackprop()) | st.builds(LastK, counts) | random_last_k()
checkpointings = st.sampled_from([RecomputeAll(), RecomputeNone()]) | st.builds(KeepSteps, naturals)
losses = st.just(Maximize()) | st.builds(Target, finite) | st.builds(Hinge, finite)

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "steps": counts,
    "batch_size": counts,
    "gradient_accumulation_steps": counts,
    "seed": st.integers(0, 2**63 - 1),
    "truncation": truncations,
    "checkpointing": checkpointings,
    "loss": losses,
    "distance_weight": not_negative,
    "max_skipped": counts,
    "rank": st.integers(1, 4096),
    "alpha": st.none() | positive,
    "target_modules": st.lists(texts, max_size=3).map(tuple),
    "init_lora_weights": st.sampled_from(["default", "gaussian"]),
    "lr": positive | st.just(1e-300),
    "lr_scheduler": st.sampled_from(["constant", "linear", "cosine"]),
    "warmup_steps": st.integers(0, 10**9),
    "betas": st.tuples(st.floats(0, 0.999999), st.floats(0, 0.999999)),
    "weight_decay": not_negative,
    "max_grad_norm": positive,
    "max_grad_growth": st.none() | positive,
    "num_inference_steps": st.integers(1, 1000),
    "guidance_scale": not_negative,
    "eta": st.floats(0, 1),
    "height": st.none() | st.integers(8, 10**6),
    "width": st.none() | st.integers(8, 10**6),
    "negative_prompt": texts,
    "eval_every": naturals,
    "eval_prompts": naturals,
    "eval_batch_size": counts,
    "keep_best": st.booleans() | st.just("reward"),
    "patience": naturals,
    "mixed_precision": st.sampled_from(["no", "fp16", "bf16"]),
    "judges": st.lists(texts.map(lambda text: text.replace(":", "")), max_size=3).map(tuple),  # no code
}


def with_looks(values: dict[str, Any]) -> AlignConfig:
    """These settings; patience needs looks to count."""
    if values.get("patience"):
        values = {**values, **{name: values.get(name, 1) or 1 for name in ("eval_every", "eval_prompts")}}
    return AlignConfig().replace(**values)


configs = st.fixed_dictionaries({}, optional=VALUES).map(with_looks)


def test_every_field_has_a_strategy_a_help_text_and_a_default_in_its_range() -> None:
    assert set(VALUES) == set(FIELD_PATHS) == {name for name, _, _ in leaves(AlignConfig())}
    assert all(len(spec.metadata["help"]) > 10 for _, spec, _ in leaves(AlignConfig()))


# --- there and back --------------------------------------------------------------------------------------------------


@given(configs)
def test_json_and_toml_lose_nothing(config: AlignConfig) -> None:
    assert AlignConfig.from_json(config.to_json()) == config
    assert AlignConfig.from_toml(config.to_toml()) == config
    assert AlignConfig.from_dict(config.to_dict()) == config
    assert {type(value) for _, _, value in leaves(config)} == {
        type(value) for _, _, value in leaves(AlignConfig.from_toml(config.to_toml()))
    }


@given(config=configs)
def test_files_lose_nothing(config: AlignConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "run.json").write_text(config.to_json(), encoding="utf-8")
    (folder / "run.TOML").write_text(config.to_toml(), encoding="utf-8-sig")
    assert AlignConfig.load(folder / "run.json") == config
    assert AlignConfig.load(str(folder / "run.TOML")) == config


@given(truncations, checkpointings, losses)
def test_text_of_a_choice_reads_back(truncation: Truncation, checkpointing: Checkpointing, loss: Loss) -> None:
    assert truncation_from_text(str(truncation)) == truncation
    assert checkpointing_from_text(str(checkpointing)) == checkpointing
    assert loss_from_text(str(loss)) == loss


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("full", FullBackprop()),
        (" Last:5 ", LastK(5)),
        ("random", RandomLastK()),
        ("random:1-10", RandomLastK(1, 10)),
        ("random:3-", RandomLastK(3)),
    ],
)
def test_truncation_texts_of_the_documentation(text: str, value: Truncation) -> None:
    assert truncation_from_text(text) == value


def test_the_names_of_the_texts_are_those_of_the_documentation() -> None:
    assert [str(value) for value in (FullBackprop(), LastK(5), RandomLastK(), RandomLastK(1, 10))] == [
        "full",
        "last:5",
        "random",
        "random:1-10",
    ]
    assert [str(value) for value in (RecomputeAll(), RecomputeNone(), KeepSteps(3))] == ["all", "none", "3"]
    assert [str(value) for value in (Maximize(), Target(10), Hinge(2))] == ["maximize", "target:10.0", "hinge:2.0"]


def test_whole_numbers_and_lists_become_what_the_field_holds() -> None:
    assert OptimizerOptions(lr=1) == OptimizerOptions(lr=1.0)
    assert type(SamplingOptions(guidance_scale=5).guidance_scale) is float
    config = AlignConfig.from_dict({"optimizer": {"betas": [0, 0.5]}, "judges": ["clip"], "checkpointing": 2})
    assert config.optimizer.betas == (0.0, 0.5)
    assert config.evaluation.judges == ("clip",)
    assert config.checkpointing == KeepSteps(2)
    name, spec, _ = next(leaf for leaf in leaves(config) if leaf[0] == "alpha")
    assert type(value_from(name, spec, 8)) is float


def test_toml_leaves_none_out_and_keeps_the_tables() -> None:
    text = AlignConfig().to_toml()
    assert "alpha" not in text
    assert re.findall(r"^\[(\w+)\]$", text, re.MULTILINE) == list(PARTS)


# --- values that are refused -----------------------------------------------------------------------------------------

OUTSIDE: dict[str, list[Any]] = {
    "steps": [0, -1, 1.5, True, "8", None],
    "batch_size": [0],
    "gradient_accumulation_steps": [0],
    "seed": [-1, 2**63],
    "truncation": [2.5, None, KeepSteps(1), ["full"]],
    "checkpointing": [2.5, True, RandomLastK()],
    "loss": [None, LastK(1)],
    "distance_weight": [-1e-9, math.nan, math.inf, 10**400],
    "max_skipped": [0],
    "rank": [0, 4097, 2.0],
    "alpha": [0, -1.0, math.inf, "8"],
    "target_modules": ["to_q", [1], [None], ["\ud800"]],
    "init_lora_weights": ["zeros", None, 1],
    "lr": [0, -1e-3, math.nan, math.inf, "1e-3", True],
    "lr_scheduler": ["polynomial", None, 1],
    "warmup_steps": [-1, 0.5, None],
    "betas": [[0.9], [0.9, 0.9, 0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, math.nan], ["0.9", "0.9"], 0.9, [True, 0.5]],
    "weight_decay": [-0.1],
    "max_grad_norm": [0],
    "max_grad_growth": [0, -1],
    "num_inference_steps": [0, 1001],
    "guidance_scale": [-1.0],
    "eta": [-0.1, 1.1],
    "height": [7, 64.0],
    "width": [0],
    "negative_prompt": [None, 3, "\udfff"],
    "eval_every": [-1],
    "eval_prompts": [-1],
    "eval_batch_size": [0],
    "keep_best": [1, "", " ", "clip", None],
    "patience": [-1],
    "mixed_precision": ["fp8", None, True],
    "judges": ["clip", [2]],
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OUTSIDE.items() for value in values])
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    assert set(OUTSIDE) == set(FIELD_PATHS)
    with pytest.raises(ConfigError, match=rf"^{name}\b.* needed|^{name}\b.* cannot be used"):
        AlignConfig().replace(**{name: value})


def test_settings_that_do_not_go_alone_go_together() -> None:
    preset = AlignConfig.preset("emoji")  # with eval_every=0, and a judge
    assert preset.replace(patience=2, eval_every=5).evaluation.patience == 2
    with pytest.raises(ConfigError, match=r"patience = 2: with eval_every = 0"):
        preset.replace(patience=2)
    assert AlignConfig().replace(keep_best="judge", judges=("clip",)).evaluation.keep_best == "judge"
    with pytest.raises(ConfigError, match=r"keep_best = 'judge': a judge to follow is needed in judges"):
        AlignConfig().replace(keep_best="judge")


@pytest.mark.parametrize("given", [True, False, "reward", "judge", "emoji_judge", "zscore(clip)"])
def test_what_keep_best_follows_survives_files(given: Any) -> None:
    config = AlignConfig().replace(keep_best=given, judges=("emoji_judge",))
    assert config.evaluation.keep_best is given or config.evaluation.keep_best == given
    assert AlignConfig.from_json(config.to_json()) == AlignConfig.from_toml(config.to_toml()) == config
    texts = {"yes": True, "No": False, "true": True, " judge ": "judge"}
    assert [AlignConfig().replace(keep_best=t, judges=("clip",)).evaluation.keep_best for t in texts] == list(
        texts.values()
    )


@pytest.mark.usefixtures("unchecked")
def test_a_part_checks_itself() -> None:
    with pytest.raises(ConfigError, match=r"rank = 0: a finite number >= 1 and <= 4096 is needed"):
        LoraOptions(rank=0)
    with pytest.raises(ConfigError, match=r"steps = 0: a finite number >= 1 is needed"):
        AlignConfig(steps=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "make",
    [
        lambda: LastK(0),
        lambda: LastK(1.5),  # type: ignore[arg-type]
        lambda: LastK("5"),  # type: ignore[arg-type]
        lambda: LastK(True),
        lambda: RandomLastK(0),
        lambda: RandomLastK(5, 4),
        lambda: RandomLastK(1.0),  # type: ignore[arg-type]
        lambda: KeepSteps(-1),
        lambda: KeepSteps(0.5),  # type: ignore[arg-type]
        lambda: Target(math.nan),
        lambda: Target("10"),  # type: ignore[arg-type]
        lambda: Target(10**400),
        lambda: Hinge(-math.inf),
        lambda: Hinge(True),
    ],
)
def test_a_choice_checks_itself(make: Any) -> None:
    with pytest.raises(ConfigError, match="needed|must be"):
        make()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("text", ["", "last", "last:", "last:x", "full:2", "random:5", "random:a-b", "gaussian", "5"])
def test_wrong_truncation_lists_the_right_ones(text: str) -> None:
    with pytest.raises(ConfigError, match=r"use one of: full, last:5, random, random:1-10"):
        truncation_from_text(text)
    with pytest.raises(ConfigError, match=r"use one of: full, last:5, random, random:1-10"):
        AlignConfig().replace(truncation=text)


@pytest.mark.parametrize(("text", "needed"), [("last:0", "1 or more"), ("random:5-2", "low <= high")])
def test_a_truncation_that_trains_nothing_is_refused(text: str, needed: str) -> None:
    with pytest.raises(ConfigError, match=needed):
        truncation_from_text(text)


@pytest.mark.parametrize("text", ["", "some", "-1", "2.5", "²", "9" * 5000])
def test_wrong_checkpointing_lists_the_right_ones(text: str) -> None:
    with pytest.raises(ConfigError, match="use one of: all, none, or a number of graded steps to keep"):
        checkpointing_from_text(text)


@pytest.mark.parametrize("text", ["", "minimize", "target", "target:", "target:nan", "hinge:1e999", "maximize:3"])
def test_wrong_loss_lists_the_right_ones(text: str) -> None:
    with pytest.raises(ConfigError, match="use one of: maximize, target:10, hinge:2"):
        loss_from_text(text)


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (truncation_from_text, checkpointing_from_text, loss_from_text):
        try:
            assert read(str(read(text))) == read(text)
        except ConfigError:
            continue


# --- names that do not exist -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stepz": 3}, "'stepz' is not known; did you mean .*steps"),
        ({"lora": {"rnk": 3}}, r"'lora\.rnk' is not known; did you mean rank"),
        ({"optimiser": {"lr": 1.0}}, "did you mean optimizer"),
        ({"lora": {"lr": 1.0}}, r"'lora\.lr' is not known"),
        ({"xyzzy": 3}, "known: .*steps"),
        ({3: 3}, "'3' is not known"),
        ({"lora": 5}, r"lora = 5: LoraOptions\(...\) or a table with some of rank, alpha"),
        ({"sampling": None}, "SamplingOptions"),
        ({"rank": 4, "lora": {"rank": 8}}, "'rank' is given twice"),
    ],
)
def test_unknown_keys_name_the_nearest_right_one(data: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AlignConfig.from_dict(data)


@pytest.mark.usefixtures("unchecked")
def test_unknown_names_in_python_are_refused_too() -> None:
    with pytest.raises(ConfigError, match="did you mean .*steps"):
        AlignConfig().replace(stesp=3)
    with pytest.raises(ConfigError, match="did you mean paper"):
        AlignConfig.preset("papr")
    with pytest.raises(ConfigError, match="lora = "):
        AlignConfig(lora=SamplingOptions())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lora = "):
        AlignConfig().replace(lora=RandomLastK())


# --- replace, base and presets ---------------------------------------------------------------------------------------


def test_replace_takes_flat_names_texts_and_whole_parts_in_any_order() -> None:
    config = AlignConfig().replace(rank=16, lora=LoraOptions(rank=2, alpha=3.0), truncation="last:2", steps=8)
    assert config.lora == LoraOptions(rank=16, alpha=3.0)
    assert (config.truncation, config.steps) == (LastK(2), 8)
    assert AlignConfig().replace() == AlignConfig()
    assert AlignConfig().lora.rank == 4, "the first one stays as it was"


def test_absent_keys_keep_the_value_of_the_base() -> None:
    base = AlignConfig.preset("emoji")
    config = AlignConfig.from_toml("steps = 3\n[sampling]\neta = 1\n", base)
    assert config == base.replace(steps=3, eta=1.0)
    assert AlignConfig.from_json("{}", base) == base


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_configuration_that_differs_from_the_defaults(name: str) -> None:
    config = AlignConfig.preset(name)
    assert AlignConfig.from_toml(config.to_toml()) == config
    assert all(getattr(config, name) is not None for name in PARTS)


def test_paper_preset_is_the_recipe_of_the_paper() -> None:
    """AlignProp, arXiv 2310.03739: Stable Diffusion 1.5, DDIM, 50 steps; 128 pictures for each optimizer step."""
    config = AlignConfig.preset("paper")
    assert config.sampling == SamplingOptions(num_inference_steps=50, guidance_scale=7.5, eta=0.0)
    assert config.lora.rank == 4
    assert config.optimizer == OptimizerOptions(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, max_grad_norm=5.0)
    assert config.batch_size * config.gradient_accumulation_steps == 128
    assert config.truncation == RandomLastK(low=1, high=None)
    assert config.checkpointing == RecomputeAll()


# --- files that cannot be read ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"[1]", "a table of settings, not list"),
        ("a.json", b'{"lr": NaN}', "lr = nan"),
        ("a.json", b'{"seed": ' + b"9" * 5000 + b"}", "is not JSON"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b"\xff\xfe\x00", "cannot be read"),
        ("a.json", b'{"step": 3}', "did you mean steps"),
        ("a.toml", b"steps = ", "is not TOML"),
        ("a.toml", b"steps = 1\nsteps = 2", "is not TOML"),
        ("a.toml", b"[lora]\nrank = 0", "rank = 0"),
        ("a.toml", b"\x89PNG\r\n\x1a\n", "cannot be read"),
        ("a.yaml", b"steps: 3", r"ends in \.toml or \.json"),
        ("a", b"", r"ends in \.toml or \.json"),
    ],
)
def test_a_broken_file_is_named_in_the_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        AlignConfig.load(path)
    assert repr(str(path)) in str(caught.value)
    assert isinstance(caught.value, AlignError)
    assert isinstance(caught.value, ValueError)


def test_a_missing_file_or_a_folder_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    for name in ("missing.json", "folder.toml", "null\0byte.toml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            AlignConfig.load(tmp_path / name)


# --- a value never changes -------------------------------------------------------------------------------------------


def test_nothing_in_a_configuration_can_be_changed() -> None:
    config = AlignConfig()
    for holder in (config, *(getattr(config, part) for part in PARTS), LastK(1), Target(1.0)):
        name = dataclasses.fields(holder)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(holder, name, 3)
    assert not hasattr(config, "__dict__")
    assert hash(config) == hash(AlignConfig())


@pytest.mark.usefixtures("unchecked")
def test_a_configuration_does_not_follow_the_list_it_was_made_from() -> None:
    names = ["to_q"]
    config = AlignConfig().replace(target_modules=names)
    names.append("to_k")
    assert config.lora.target_modules == ("to_q",)
    assert EvaluationOptions(judges=names).judges == ("to_q", "to_k")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (AlignConfig, {"lr": 1e-3}, 'AlignConfig.preset("fast").replace(lr=...)'),
        (AlignConfig, {"lr": 1e-3}, "AlignConfig(optimizer=OptimizerOptions(lr=...))"),
        (AlignConfig, {"judges": ("clip",)}, "AlignConfig(evaluation=EvaluationOptions(judges=...))"),
        (AlignConfig, {"ranks": 3}, "did you mean rank?"),
        (LoraOptions, {"lr": 1e-3}, "OptimizerOptions"),
        (SamplingOptions, {"steps": 3}, "AlignConfig(steps=...)"),
        (EvaluationOptions, {"lora": 3}, "AlignConfig(lora=...)"),
        (OptimizerOptions, {"rate": 3}, "no setting 'rate'"),
    ],
)
def test_a_setting_in_the_wrong_place_is_told_where_it_lives(kind: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        kind(**given)
    with pytest.raises(ConfigError, match="by name"):
        kind(3)


WRONG = ["x", 1.5, -1, True, None, [1], {"a": 1}, "", math.inf, [None], [[]]]


def test_a_wrong_type_in_a_file_is_told_in_words_of_ours() -> None:
    """pydantic checks flags for Typer; nothing that it says of them comes out of a file."""
    told = []
    for name in (*FIELD_PATHS, *PARTS):
        for value in WRONG:
            try:
                AlignConfig.from_dict({name: value})
            except ConfigError as error:
                told.append(str(error))
    assert len(told) > 5 * len(FIELD_PATHS)
    assert not [text for text in told if re.search("pydantic|Value error|Input should|validation error", text)]
