"""Pipelines in the states that people have: each is aligned exactly as it draws, or refused in words at once.

Exact: the pictures of a rollout are those of the stock call in that state, and its gradient is that of the stock call
without its `no_grad` decorator and with nothing of ours round it.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
import miniatures
import pytest
import torch
from aligning import adapter, align, aligned, is_stock, pictures, state
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.hooks import (
    HookRegistry,
    LayerSkipConfig,
    ModelHook,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_layer_skip,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from alignprop_pipe import Adapter, AlignPropPipeline, inspect_adapter
from alignprop_pipe.config.settings import AlignConfig, LoraOptions
from alignprop_pipe.diffusion import lora, patching, pipeline_parts
from alignprop_pipe.diffusion.rollout import rollout
from alignprop_pipe.errors import AdapterError, PipelineError
from alignprop_pipe.records import PromptBatch
from alignprop_pipe.training.forecast import forecast

State = Callable[[Any], object]

# --- fused projections ------------------------------------------------------------------------------------------------

FUSABLE = {name: miniatures.FAMILIES[name] for name in ("sd15", "sdxl", "sd3", "flux", "pixart", "wan")}


@pytest.mark.parametrize("name", FUSABLE)
def test_fused_projections_are_refused_and_leave_no_layers_behind(name: str) -> None:
    pipe: Any = aligned(FUSABLE[name].make())
    ((component, denoiser),) = pipeline_parts.denoisers(pipe).items()
    names = lora.attention_linears(denoiser)
    denoiser.fuse_qkv_projections()  # pyright: ignore[reportCallIssue]
    words = rf"{component}.*fuse_qkv.*{component}\.unfuse_qkv_projections\(\) first"
    with pytest.raises(PipelineError, match=words):
        pipe.align("brightness", ["a red dog"], steps=1)
    assert is_stock(pipe)
    denoiser.unfuse_qkv_projections()  # pyright: ignore[reportCallIssue]
    assert lora.attention_linears(denoiser) == names  # the older classes keep the copies
    lora.attach({component: denoiser}, LoraOptions(rank=2), 0)


def test_an_adapter_has_no_effect_on_fused_projections_and_is_refused() -> None:
    result = align(aligned())
    pipe = aligned()
    pipe.fuse_qkv_projections()
    with pytest.raises(AdapterError, match=r"fuse_qkv.*unfuse_qkv_projections\(\) first"):
        pipe.load_adapter(result.adapter)
    pipe.unfuse_qkv_projections()
    pipe.load_adapter(result.adapter)


# --- states that are exact --------------------------------------------------------------------------------------------


def tiling(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8


def style(pipe: Any) -> None:
    """Another LoRA, on layers of its own too, at another strength and in training mode."""
    config = LoraConfig(r=2, target_modules=["to_k", "conv_in"], init_lora_weights=False)
    pipe.unet.add_adapter(config, adapter_name="style")
    pipe.set_adapters(["style"], [0.5])


def unwrapped(pipe: Any) -> None:
    """What is left of a PeftModel by the way out of its refusal."""
    config = LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False)
    pipe.unet = get_peft_model(pipe.unet, config).base_model.model


def fused_for_good(pipe: Any) -> None:
    style(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def ip_adapter(pipe: Any) -> None:
    """Its layers are in the processors; an adapter of ours has none there."""
    width, names = miniatures.WIDTH, lora.attention_linears(pipe.unet)
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    cross = [path.removesuffix(".processor") for path in pipe.unet.attn_processors if ".attn2." in path]
    outs = [pipe.unet.get_submodule(path).to_k.out_features for path in cross]
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    layers = {
        f"{2 * number + 1}.to_{kind}_ip.weight": drawn(out, width) for number, out in enumerate(outs) for kind in "kv"
    }
    projection = {"proj.weight": drawn(4 * width, width), "proj.bias": drawn(4 * width), **norm}
    pipe.load_ip_adapter(
        {"image_proj": projection, "ip_adapter": layers}, subfolder="", weight_name="", image_encoder_folder=None
    )
    assert lora.attention_linears(pipe.unet) == names


LOOK = {"ip_adapter_image_embeds": [torch.randn(4, 1, 1, 16, generator=torch.Generator().manual_seed(0))]}


def compiled(part: str) -> State:
    return lambda pipe: setattr(pipe, part, torch.compile(getattr(pipe, part), backend="eager"))


def compiled_method(part: str, method: str) -> State:
    def prepare(pipe: Any) -> None:
        network = getattr(pipe, part)
        setattr(network, method, torch.compile(getattr(network, method), backend="eager"))

    return prepare


UNET: dict[str, State] = {
    "plain": lambda _: None,
    "freeu": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "vae slicing": lambda pipe: pipe.vae.enable_slicing(),
    "vae tiling": tiling,
    "gradient checkpointing": lambda pipe: pipe.unet.enable_gradient_checkpointing(),
    "training mode": lambda pipe: pipe.unet.train(),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "attention backend": lambda pipe: pipe.unet.set_attention_backend("_native_math"),
    "fused vae": lambda pipe: pipe.fuse_qkv_projections(unet=False),
    "unfused": lambda pipe: (pipe.fuse_qkv_projections(), pipe.unfuse_qkv_projections()),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "weights that want gradients": lambda pipe: (pipe.vae.requires_grad_(True), pipe.unet.requires_grad_(True)),
    "double": lambda pipe: pipe.to(torch.float64),
    "compiled blocks": lambda pipe: pipe.unet.mid_block.compile(backend="eager"),
    "compiled forward": compiled_method("unet", "forward"),
    "compiled decode": compiled_method("vae", "decode"),
    "compiled vae": compiled("vae"),
    "compiled text encoder": compiled("text_encoder"),
    "another LoRA": style,
    "a LoRA that is fused for good": fused_for_good,
    "a PeftModel's network": unwrapped,
    "IP-Adapter": ip_adapter,
    "textual inversion": lambda pipe: pipe.load_textual_inversion({"<mine>": torch.ones(16)}, token="<mine>"),
}
FLUX: dict[str, State] = {
    "skipped layers": lambda pipe: apply_layer_skip(
        pipe.transformer, LayerSkipConfig(indices=[0], fqn="transformer_blocks")
    ),
    "a cache that was switched off": lambda pipe: (
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1)),
        pipe.transformer.disable_cache(),
    ),
    "compiled repeated blocks": lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"),
    "attention backend": lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
    "gradient checkpointing": lambda pipe: pipe.transformer.enable_gradient_checkpointing(),
}
SLOW = ("compiled forward", "compiled decode", "compiled text encoder")  # tracing; "compiled blocks" is of their kind
EXACT = [
    pytest.param(make, name, prepare, id=f"{make.__name__}-{name}", marks=[pytest.mark.slow] if name in SLOW else [])
    for make, states in ((miniatures.sd15, UNET), (miniatures.flux, FLUX))
    for name, prepare in states.items()
]


def in_use(pipe: AlignPropPipeline) -> list[nn.Parameter]:
    """An adapter with an up matrix that is not zero; its weights."""
    lora.attach(pipeline_parts.denoisers(pipe), LoraOptions(rank=2), seed=0)
    generator = torch.Generator().manual_seed(11)
    weights = lora.trainable(pipeline_parts.denoisers(pipe))
    for weight in weights:
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return weights


def gradient(images: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    """Zeros for layers that the pictures do not go through."""
    return list(torch.autograd.grad(images.double().square().sum(), weights, materialize_grads=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's and PEFT's own
@pytest.mark.parametrize(("make", "name", "prepare"), EXACT)
def test_pictures_and_gradient_are_those_of_the_undecorated_call(make: Any, name: str, prepare: State) -> None:
    pipe = aligned(make())
    prepare(pipe)
    before = state(pipe)
    weights = in_use(pipe)
    extra = {} if make is miniatures.sd15 else {"max_sequence_length": 16}
    extra |= LOOK if name == "IP-Adapter" else {}
    size = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 16, "width": 16}
    call: Any = inspect.unwrap(type(pipe).__call__)
    drawn = by_hand.stock_pictures(pipe, {"prompt": by_hand.PROMPTS, **size, **extra})
    with patching.frozen_for_training(pipe, weights):
        given = {"prompt": by_hand.PROMPTS, "generator": by_hand.generators(), "output_type": "pt", **size, **extra}
        wanted = gradient(call(pipe, **given)[0], weights)
        config = AlignConfig().replace(truncation="full", **size)
        noise = by_hand.generators()
        made = rollout(pipe, PromptBatch(by_hand.PROMPTS), config, noise, torch.Generator().manual_seed(0), **extra)
        got = gradient(made.images, weights)
    torch.testing.assert_close(made.images.detach(), drawn, rtol=0, atol=1e-6 if "compiled" in name else 0)
    assert by_hand.relative_difference(got, wanted) < 1e-5
    assert state(pipe) == before
    lora.detach(pipeline_parts.denoisers(pipe))
    assert state(pipe) == before
    if make is miniatures.sd15 and name != "IP-Adapter":
        align(pipe)
        assert any(weight.any() for weight in adapter(pipe)[1::2])


# --- states that are refused ------------------------------------------------------------------------------------------


class Unknown(ModelHook):
    """A hook of somebody's own."""


def replaced_forward(pipe: Any) -> None:
    """As DeepCache does it."""
    block = pipe.unet.down_blocks[0]
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)


def offloaded_leaves(part: str) -> State:
    cpu = torch.device("cpu")
    return lambda pipe: getattr(pipe, part).enable_group_offload(cpu, cpu, "leaf_level")


def cast(part: str) -> State:
    return lambda pipe: getattr(pipe, part).enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def integer_weights(pipe: Any) -> None:
    pipe.unet.conv_in.weight = nn.Parameter(torch.zeros(16, 4, 3, 3, dtype=torch.int8), requires_grad=False)


def quantised_dynamically(pipe: Any) -> None:
    torch.ao.quantization.quantize_dynamic(pipe.unet, {nn.Linear}, dtype=torch.qint8, inplace=True)


def peft_model(pipe: Any) -> None:
    pipe.unet = get_peft_model(pipe.unet, LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))


def data_parallel(pipe: Any) -> None:
    pipe.unet = nn.DataParallel(pipe.unet)


def cached(config: Any) -> State:
    return lambda pipe: pipe.transformer.enable_cache(config)


BROADCAST = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 5)
FASTER = FasterCacheConfig(
    spatial_attention_block_identifiers=("blocks",), current_timestep_callback=lambda: 5, is_guidance_distilled=True
)
CASTING = r"in another format.*enable_layerwise_casting.*load the pipeline anew"
CACHE = r"earlier steps over.*pipe\.transformer\.disable_cache\(\) first"
REFUSED: list[tuple[Any, str, State, str]] = [
    (miniatures.sd15, "layerwise casting", cast("unet"), f"unet .*{CASTING}"),
    (miniatures.sd15, "layerwise casting of the decoder", cast("vae"), f"vae .*{CASTING}"),
    (miniatures.sd15_controlnet, "layerwise casting of a ControlNet", cast("controlnet"), f"controlnet .*{CASTING}"),
    (miniatures.sd15, "offloaded leaves", offloaded_leaves("unet"), r"unet is offloaded.*remove_all_hooks\(\)"),
    (miniatures.sd15, "an offloaded decoder", offloaded_leaves("vae"), "vae is offloaded"),
    (miniatures.sd15, "replaced forward", replaced_forward, r"unet\.down_blocks\.0 .* was replaced by test_states"),
    (miniatures.sd15, "integer weights", integer_weights, r"unet is quantised \(torch\.int8\)"),
    (miniatures.sd15, "quantised layers", quantised_dynamically, "unet is quantised"),
    (
        miniatures.sd15,
        "PeftModel",
        peft_model,
        r"set pipe\.unet = pipe\.unet\.base_model\.model, or .*merge_and_unload",
    ),
    (miniatures.sd15, "DataParallel", data_parallel, r"set pipe\.unet = pipe\.unet\.module$"),
    (miniatures.flux, "first block cache", cached(FirstBlockCacheConfig(threshold=0.1)), CACHE),
    (miniatures.flux, "attention broadcast", cached(BROADCAST), CACHE),
    (miniatures.flux, "Taylor seer", cached(TaylorSeerCacheConfig()), CACHE),
    (miniatures.flux, "faster cache", lambda p: apply_faster_cache(p.transformer, FASTER), r"remove_hook\('faster_"),
    (
        miniatures.sd15,
        "a hook of one's own",
        lambda p: HookRegistry.check_if_exists_or_initialize(p.unet.mid_block).register_hook(Unknown(), "mine"),
        r"unet\.mid_block has a hook .*Unknown.*pipe\.unet\.mid_block\)\.remove_hook\('mine'\) first",
    ),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
@pytest.mark.parametrize(("make", "name", "prepare", "words"), REFUSED, ids=lambda one: one if type(one) is str else "")
def test_other_states_are_refused_before_anything_is_drawn(make: Any, name: str, prepare: State, words: str) -> None:
    pipe = aligned(make())
    prepare(pipe)
    calls: list[object] = []
    for part in pipeline_parts.components(pipe).values():
        part.register_forward_pre_hook(lambda *_: calls.append(1))
    own = [dict(vars(part)) for part in pipeline_parts.components(pipe).values()]
    with pytest.raises(PipelineError, match=words):
        align(pipe, "zscore(brightness)")
    with pytest.raises(PipelineError, match=words):
        forecast(pipe, AlignConfig())
    assert calls == []
    assert lora.held(pipeline_parts.components(pipe).values()) == ""
    for part, kept in zip(pipeline_parts.components(pipe).values(), own, strict=True):
        assert vars(part).keys() == kept.keys()


def test_what_differs_the_second_time_is_said_in_words() -> None:
    """Where no structure tells it: here a patched class, as ToMe makes them."""
    pipe = aligned()
    calls: list[int] = []

    class Patched(type(pipe.unet.mid_block)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            skipped = len(calls) % 2 == 0
            return hidden_states if skipped else super().forward(hidden_states, *args, **kwargs)

    pipe.unet.mid_block.__class__ = Patched
    with pytest.raises(PipelineError, match=r"something else the second time.*checkpointing='none'"):
        align(pipe, truncation="last:1", num_inference_steps=1)
    assert is_stock(pipe)
    align(pipe, num_inference_steps=2, truncation="last:1", checkpointing="none")


@pytest.mark.parametrize("is_off", [False, True])
def test_after_a_failure_other_loras_are_on_or_off_as_before(is_off: bool) -> None:
    pipe = aligned()
    style(pipe)
    drawn = pictures(pipe)
    if is_off:
        pipe.disable_lora()
    before = pictures(pipe)

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        if images.shape[-1] == 16:
            raise KeyError("broken in a step")
        return images.mean(dim=(1, 2, 3))

    with pytest.raises(KeyError):
        align(pipe, reward)
    assert torch.equal(pictures(pipe), before)
    pipe.enable_lora()
    assert torch.equal(pictures(pipe), drawn)
    assert lora.active_others(pipe) == [lora.OtherLora("unet", "style", 0.5)]


def test_a_window_ends_with_its_adapter_and_is_not_fused_away(tmp_path: Path) -> None:
    pipe = aligned()
    drawn = pictures(pipe)
    pipe.load_adapter(align(aligned()).adapter, window=(0.0, 0.5))
    pipe.fuse_lora()
    with pytest.raises(AdapterError, match=r"window 0\.0-0\.5 .*is fused: call pipe\.unfuse_lora\(\) first"):
        pipe.save_pretrained(tmp_path)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    pipe.scheduler = miniatures.make_scheduler("EulerDiscreteScheduler")
    sample = torch.zeros(1, 4, 8, 8)
    pipe.unet(sample, 10, torch.zeros(1, 3, 16))  # a call of its own, which tells no step
    pipe.scheduler = miniatures.sd15().scheduler
    torch.testing.assert_close(pictures(pipe), drawn, rtol=0, atol=1e-5)


def test_inspect_names_layers_that_only_a_fused_model_has(tmp_path: Path) -> None:
    adapter = align(aligned()).adapter
    ((name, layers),) = adapter.layers.items()
    path = next(path for path in layers if path.endswith("to_q"))
    copy_of = path.replace("to_q", "to_qkv")
    faulty = Adapter({name: {**layers, copy_of: layers[path]}}, adapter.base)
    (file,) = faulty.save(tmp_path / "a.safetensors", format="diffusers")
    assert any("fused projections" in problem and copy_of in problem for problem in inspect_adapter(file).problems)
    (file,) = adapter.save(tmp_path / "b.safetensors", format="diffusers")
    assert inspect_adapter(file).problems == ()
