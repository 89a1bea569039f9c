"""Which programs load a LoRA file, by the rules that their loaders follow: key names, family, header.

ComfyUI drops a key that it does not know with one line on its console, so that a file may work in part. AUTOMATIC1111
hides a file whose header speaks of another model than the one that is open.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from alignprop_pipe.adapters.keys import UNETS, place_of


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a program loads a file, and why; None where it is not known."""

    program: str
    loads: bool | None
    reason: str


_TEXT = re.compile(r"lora_te[123]?_|text_encoder(_2)?\.text_model\.encoder\.layers\.|text_encoders\.")
_TEXT_UNKNOWN = re.compile(r"lora_te_?1?_text_projection")
_UNET = re.compile(r"lora_unet_|lycoris_|diffusion_model\.|(unet\.)?(?!.*\.to_(q|k|v|out)\b)|.*\.processor\.")
_DIFFUSERS_OR_NATIVE = r"transformer\.|diffusion_model\.|lora_transformer_|lycoris_"

COMFYUI: dict[str, re.Pattern[str]] = {
    **dict.fromkeys(UNETS, _UNET),
    "SD3Transformer2DModel": re.compile(
        rf"{_DIFFUSERS_OR_NATIVE}|base_model\.model\.|lora_unet_(joint_blocks|x_embedder|context_embedder)_"
    ),
    "FluxTransformer2DModel": re.compile(
        rf"{_DIFFUSERS_OR_NATIVE}|lora_unet_(double_blocks|single_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final)"
    ),
    "AuraFlowTransformer2DModel": re.compile(r"transformer\.|diffusion_model\."),
    "PixArtTransformer2DModel": re.compile(r"transformer\.|diffusion_model\.|base_model\.model\."),
    "QwenImageTransformer2DModel": re.compile(
        r"transformer\.|diffusion_model\.|lycoris_|lora_unet_transformer_blocks_|transformer_blocks\."
    ),
    "WanTransformer3DModel": re.compile(
        r"diffusion_model\.(?!.*\.(attn1|attn2)\.)|lora_unet_blocks_\d+_(self_attn|cross_attn|ffn)_"
    ),
    "LTXVideoTransformer3DModel": re.compile(r"diffusion_model\.|lora_unet_transformer_blocks_"),
    "HunyuanVideoTransformer3DModel": re.compile(
        r"(transformer|diffusion_model)\.(double|single)_blocks\.|lora_unet_(double|single)_blocks_"
    ),
}
"""Family -> what the names of layers begin with that ComfyUI knows, in the oldest version in use."""

KOHYA = re.compile(r"lora_unet_|lora_te[123]?_")


def unknown_to_comfyui(family: str, layers: Sequence[str]) -> list[str] | None:
    """The layers, by their names in the file, that ComfyUI would drop; None where the family is not known."""
    if family not in COMFYUI:
        return None
    return [name for name in layers if not _comfyui_knows(family, name)]


def _comfyui_knows(family: str, name: str) -> bool:
    if place_of(name).component.startswith("text_encoder"):
        unknown = family in UNETS and name.startswith("lora_te3_")  # a third encoder, which no UNet has
        return _TEXT.match(name) is not None and _TEXT_UNKNOWN.match(name) is None and not unknown
    return COMFYUI[family].match(name) is not None


def verdicts(
    family: str,
    layers: Sequence[str],
    header: Mapping[str, str],
    of_diffusers: tuple[bool | None, str],
    missing: Collection[str] = (),
    faulty: str = "",
) -> tuple[Verdict, ...]:
    """What diffusers, ComfyUI and AUTOMATIC1111 do with a file.

    Args:
        family: of the denoiser.
        layers: names of layers as the file has them.
        header: its texts.
        of_diffusers: what `stock_loading` says, and why.
        missing: those of `layers` that the model has not, as far as it is known here.
        faulty: the first layer whose matrices are damaged, and what is wrong with them.
    """
    others = (_comfyui(family, layers, missing), _automatic(family, layers, header, missing))
    if faulty:  # each of them leaves such a layer out or stops there
        others = tuple(Verdict(other.program, False, other.reason if not other.loads else faulty) for other in others)
    return Verdict("diffusers", *of_diffusers), *others


def _comfyui(family: str, layers: Sequence[str], missing: Collection[str]) -> Verdict:
    dropped = unknown_to_comfyui(family, layers)
    if dropped is not None:  # under diffusion_model. it knows all of the model's own names, more than are known here
        no_layers = [name for name in missing if name not in dropped and not name.startswith("diffusion_model.")]
        dropped += no_layers
    if dropped is None:
        return Verdict("ComfyUI", None, f"which names it knows for {family or 'this model'} is not known here")
    if not dropped:
        return Verdict("ComfyUI", True, f"it knows all {len(layers)} layers by these names")
    left = len(layers) - len(dropped)
    if not left:
        return Verdict("ComfyUI", False, f"it knows none of these names, such as {dropped[0]!r}")
    share = f"it would load {left} of {len(layers)} layers and drop the others with a line on its console"
    return Verdict("ComfyUI", False, f"half-applied: {share}, the first of them {dropped[0]!r}")


def _automatic(family: str, layers: Sequence[str], header: Mapping[str, str], missing: Collection[str]) -> Verdict:
    program = "AUTOMATIC1111, kohya"
    other = [name for name in layers if not KOHYA.match(name)]
    if other:
        return Verdict(program, False, f"they want kohya's names (lora_unet_…), not {other[0]!r}")
    if missing:
        return Verdict(program, False, f"the model has no layer {next(iter(missing))!r}")
    if family not in UNETS:
        return Verdict(program, bool(family) or None, "kohya's scripts read it; AUTOMATIC1111 has no such model")
    if hidden := hidden_by(family, header):
        return Verdict(program, False, hidden)
    return Verdict(program, True, "they know kohya's names, and the header does not hide it")


def hidden_by(family: str, header: Mapping[str, str]) -> str:
    """Why AUTOMATIC1111 hides the file while its own model is open; empty where it shows it.

    It takes a file whose header has anything in it for one of Stable Diffusion 1, unless two fields say another.
    """
    if not header or family not in UNETS:
        return ""
    version, is_v2 = header.get("ss_base_model_version", ""), header.get("ss_v2", "")
    taken_for = "xl" if version.startswith("sdxl_") else "v2" if is_v2 == "True" else "v1"
    if taken_for == family:
        return ""
    wanted = {"xl": "ss_base_model_version is no 'sdxl_…'", "v2": "ss_v2 is not 'True'"}
    reason = wanted.get(family, f"ss_v2 is {is_v2!r} and ss_base_model_version {version!r}")
    return f"AUTOMATIC1111 takes it for a file of {taken_for} and hides it, since in its header {reason}"
