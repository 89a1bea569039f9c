"""What the keys of a LoRA file say: the layer of a network, the matrix in it, and the naming scheme.

No weights are needed, so a file can be judged by its header alone. Names of keys: kohya's (`lora_unet_a_b.lora_down`),
diffusers' (`unet.a.b.lora_A`, and those of 2023 with `processor` and `_lora.down`), PEFT's (`base_model.model.a.b` or
`a.b`), ComfyUI's (`diffusion_model.a.b`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from alignprop_pipe.adapters.file_kinds import said_of_unknown

MOST_RANK = 8192
"""More than any layer in use has inputs or outputs; a matrix of such a rank says nothing that a full one would not."""
MOST_ALPHA = 1e6
"""A file with more was damaged, or made to drown the model."""

_KEY = re.compile(
    r"(?P<layer>.+?)"
    r"(?:(?P<number>_lora\d)\.(?P<numbered>down|up)\.weight"
    r"|\.lora_(?P<peft>A|B)(?:\.default(?:_\d+)?)?\.weight"
    r"|(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(?P<old>down|up)\.weight"
    r"|(?P<alpha>\.alpha))"
)
_MATRICES = {"A": "down", "B": "up", "down": "down", "up": "up"}


@dataclass(frozen=True, slots=True)
class FileLayers:
    """The keys of a file by layer, each layer under the name that it has in the file.

    `layers` holds "down", "up" and "alpha" where they are there; `unknown` the keys that belong to no plain LoRA.
    """

    layers: Mapping[str, Mapping[str, Tensor]]
    unknown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer is: component ("denoiser", "denoiser_2", "text_encoder", ...), path, and whose name it is."""

    component: str
    path: str
    scheme: str


_PREFIXES = (
    ("lora_te.", "text_encoder", "OneTrainer"),
    ("lora_te1.", "text_encoder", "OneTrainer"),
    ("lora_te2.", "text_encoder_2", "OneTrainer"),
    ("lora_te3.", "text_encoder_3", "OneTrainer"),
    ("lora_unet.", "denoiser", "OneTrainer"),
    ("lora_transformer.", "denoiser", "OneTrainer"),
    ("text_encoders.clip_l.transformer.", "text_encoder", "ComfyUI"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2", "ComfyUI"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3", "ComfyUI"),
    ("pipe.dit.", "denoiser", "DiffSynth"),
    ("lora_te1_", "text_encoder", "kohya"),
    ("lora_te2_", "text_encoder_2", "kohya"),
    ("lora_te3_", "text_encoder_3", "kohya"),
    ("lora_te_", "text_encoder", "kohya"),
    ("lora_unet_", "denoiser", "kohya"),
    ("lora_transformer_", "denoiser", "kohya"),
    ("lycoris_", "denoiser", "kohya"),
    ("text_encoder_3.", "text_encoder_3", "diffusers"),
    ("text_encoder_2.", "text_encoder_2", "diffusers"),
    ("text_encoder.", "text_encoder", "diffusers"),
    ("transformer_2.", "denoiser_2", "diffusers"),
    ("transformer.", "denoiser", "diffusers"),
    ("unet.", "denoiser", "diffusers"),
    ("diffusion_model.", "denoiser", "ComfyUI"),
    ("base_model.model.", "denoiser", "PEFT"),
)


def split_key(key: str) -> tuple[str, str] | None:
    """The layer's name in the file and "down", "up" or "alpha"; None for what no plain LoRA has."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    matrix = found["peft"] or found["old"] or found["numbered"]
    return found["layer"] + (found["number"] or ""), _MATRICES.get(matrix or "", "alpha")


def layers_of(tensors: Mapping[str, Tensor]) -> FileLayers:
    """Sort the keys of a file by layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None and key.endswith((".diff", ".diff_b")) and not bool(tensor.any()):
            continue  # ComfyUI writes those that its training left at zero
        if split is None or split[1] in layers.get(split[0], {}):
            unknown.append(key)
        else:
            layers.setdefault(split[0], {})[split[1]] = tensor
    return FileLayers(layers, tuple(unknown))


def check(tensors: Mapping[str, Tensor]) -> FileLayers:
    """The layers of a plain LoRA, each whole and once. Raises ValueError, which says what is wrong first."""
    found = layers_of(tensors)
    if found.unknown:
        raise ValueError(said_of_unknown(found.unknown))
    for layer, parts in found.layers.items():
        if problem := problem_of(parts):
            raise ValueError(f"{layer!r} {problem}")
    if twice := duplicates(found.layers):
        raise ValueError(f"{' and '.join(map(repr, twice))} are the same layer")
    return found


def problem_of(parts: Mapping[str, Tensor]) -> str:
    """What is wrong with the matrices of a layer, or an empty text."""
    if not {"down", "up"} <= parts.keys():
        return f"has only {' and '.join(sorted(parts))} of its two matrices"
    down, up = parts["down"], parts["up"]
    if down.ndim != up.ndim or not 2 <= down.ndim <= 5 or up.shape[2:].numel() != 1:
        return f"has matrices of shapes {tuple(down.shape)} and {tuple(up.shape)}, which are none of a LoRA"
    rank = down.shape[0]
    if rank != up.shape[1] or not down.numel() or not up.numel():
        return f"has matrices of shapes {tuple(down.shape)} and {tuple(up.shape)}, which do not fit together"
    if rank > MOST_RANK:
        return f"has rank {rank}, and no layer in use takes more than {MOST_RANK}"
    if "alpha" in parts and parts["alpha"].numel() != 1:
        return f"has an alpha of shape {tuple(parts['alpha'].shape)}, where one number is needed"
    if "alpha" in parts and abs(float(parts["alpha"])) > MOST_ALPHA:
        return f"has alpha {float(parts['alpha']):g}, and none in use is beyond {MOST_ALPHA:g}"
    return ""


def duplicates(layers: Iterable[str]) -> tuple[str, ...]:
    """Two names of the same layer, the first that are found; empty where each is there once."""
    seen: dict[str, str] = {}
    for layer in layers:
        other = seen.setdefault(plain_name(layer), layer)
        if other != layer:
            return other, layer
    return ()


def place_of(layer: str) -> Place:
    """The network and the path in it, which is flat (`a_b_c`) in kohya's naming scheme."""
    for prefix, component, scheme in _PREFIXES:
        if layer.startswith(prefix):
            path = layer.removeprefix(prefix)
            if scheme == "diffusers" and ".processor." in path:
                scheme = "diffusers (2023)"
            return Place(component, path, scheme)
    return Place("denoiser", layer, "diffusers (2023)" if ".processor." in layer else "PEFT")


def plain_name(layer: str) -> str:
    """One name for a layer, whichever naming scheme it is written in, as far as no model has to be known for that."""
    place = place_of(layer)
    flat = place.path.replace(".processor.", ".").replace(".", "_")
    if place.component.startswith("text_encoder"):
        flat = flat.removeprefix("text_model_")
    elif flat.endswith("_to_out"):
        flat += "_0"
    return f"{place.component} {flat}"


# --- which model -----------------------------------------------------------------------------------------------------

PIPELINES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl": "StableDiffusionXLPipeline",
    "AuraFlowTransformer2DModel": "AuraFlowPipeline",
    "CogVideoXTransformer3DModel": "CogVideoXPipeline",
    "ChromaTransformer2DModel": "ChromaPipeline",
    "CogView4Transformer2DModel": "CogView4Pipeline",
    "Flux2Transformer2DModel": "Flux2Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "HiDreamImageTransformer2DModel": "HiDreamImagePipeline",
    "HunyuanVideoTransformer3DModel": "HunyuanVideoPipeline",
    "LTXVideoTransformer3DModel": "LTXPipeline",
    "LTX2VideoTransformer3DModel": "LTX2Pipeline",
    "Lumina2Transformer2DModel": "Lumina2Pipeline",
    "MochiTransformer3DModel": "MochiPipeline",
    "PixArtTransformer2DModel": "PixArtSigmaPipeline",
    "QwenImageTransformer2DModel": "QwenImagePipeline",
    "SanaTransformer2DModel": "SanaPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "WanTransformer3DModel": "WanPipeline",
    "ZImageTransformer2DModel": "ZImagePipeline",
}
"""Families whose files are told apart -> the pipeline class of diffusers that reads them."""

UNETS = ("v1", "v2", "xl")

_UNET = re.compile(r"(^|_)(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)_")
_WAN = re.compile(r"^blocks_\d+_((self|cross)_attn_[qkvo]|attn[12]_(to_|add_)|ffn_)")
_DOUBLE = re.compile(r"^(?:transformer_blocks|double_blocks)_(\d+)_")
_SINGLE = re.compile(r"^single(?:_transformer)?_blocks_(\d+)_")

_FIRST_OF_MLP = re.compile(r".*_(?=linear1$|img_mlp_0$|txt_mlp_0$)")

_MARKS = (
    (r"^distilled_guidance_layer_", "ChromaTransformer2DModel"),
    (r"double_stream_blocks_|single_stream_blocks_", "HiDreamImageTransformer2DModel"),
    (r"^joint_transformer_blocks_", "AuraFlowTransformer2DModel"),
    (r"^joint_blocks_|_x_block_attn_", "SD3Transformer2DModel"),
    (r"to_qkv_mlp_proj|^(double|single)_stream_modulation", "Flux2Transformer2DModel"),
    (r"^layers_\d+_attention_(to_|qkv|out|norm)", "ZImageTransformer2DModel"),
    (r"^(layers|noise_refiner|context_refiner)_\d+_attn_", "Lumina2Transformer2DModel"),
    (r"^transformer_blocks_\d+_attn1_add_", "MochiTransformer3DModel"),
    (r"^transformer_blocks_\d+_((img|txt)_(mlp|mod))_", "QwenImageTransformer2DModel"),
    (r"^transformer_blocks_\d+_ff_conv", "SanaTransformer2DModel"),
    (r"^transformer_blocks_\d+_(audio_|video_to_audio_)", "LTX2VideoTransformer3DModel"),
)
"""Flat paths that a single family has."""

_WIDTHS = {1152: "PixArtTransformer2DModel", 2048: "LTXVideoTransformer3DModel", 2240: "SanaTransformer2DModel"}
_WIDTHS_SELF = {1920: "CogVideoXTransformer3DModel", 3072: "CogVideoXTransformer3DModel"}
_WIDTHS_SELF |= {4096: "CogView4Transformer2DModel"}
_TEXT_WIDTHS = {768: "v1", 1024: "v2", 2048: "xl", 1280: "xl"}


@dataclass(frozen=True, slots=True)
class Clues:
    """What a family is told by: flat paths in the denoiser, the inputs of each, other networks, the header."""

    inputs: Mapping[str, int]
    others: frozenset[str]
    header: Mapping[str, str] = field(default_factory=dict)

    def width(self, ending: str) -> int:
        """The inputs of the first layer whose flat path matches; 0 where there is none."""
        return next((width for path, width in self.inputs.items() if re.search(ending, path)), 0)

    def has(self, pattern: str | re.Pattern[str]) -> bool:
        return any(re.search(pattern, path) for path in self.inputs)


def clues_in(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Clues:
    """What a file tells of the model that it is for."""
    inputs, others = {}, set()
    for layer, parts in layers_of(tensors).layers.items():
        place = place_of(layer)
        if not place.component.startswith("denoiser"):
            others.add(place.component)
            continue
        flat = place.path.replace(".processor.", ".").replace(".", "_")
        down = parts.get("down")
        inputs[flat] = down.shape[1] if down is not None and down.ndim > 1 else 0
    return Clues(inputs, frozenset(others), header)


def family_of(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """The family of a LoRA file's denoiser, as in `PIPELINES`; empty where keys, shapes and header leave it open."""
    if (told := header.get("adapter_config.base_model_class", "")) in PIPELINES:
        return told
    clues = clues_in(tensors, header)
    if not clues.inputs or clues.has(_UNET):
        return _unet_family(clues, tensors) if clues.inputs or clues.others else ""
    if any(".img_attn_qkv." in key or ".img_attn_proj." in key for key in tensors):
        return "HunyuanVideoTransformer3DModel"
    for pattern, family in _MARKS:
        if clues.has(pattern):
            is_lumina = clues.width(r"_attention_(qkv|out)$") == 2304  # whose own names are those of Z-Image
            return "Lumina2Transformer2DModel" if family.startswith("ZImage") and is_lumina else family
    if clues.has(_WAN):
        return "WanTransformer3DModel"
    if clues.has(_SINGLE) or clues.has(r"^double_blocks_"):
        return _two_stream_family(clues, tensors)
    return _one_stream_family(clues)


def _two_stream_family(clues: Clues, tensors: Mapping[str, Tensor]) -> str:
    """Flux has 19 and 38 blocks, HunyuanVideo 20 and 40 of the same names and widths; Flux 2 has gates in its MLPs."""
    for layer, parts in layers_of(tensors).layers.items():
        gated = {"linear1": 9, "img_mlp_0": 6, "txt_mlp_0": 6}.get(_FIRST_OF_MLP.sub("", layer.replace(".", "_")), 0)
        if {"down", "up"} <= parts.keys() and gated and parts["up"].shape[0] == gated * parts["down"].shape[1]:
            return "Flux2Transformer2DModel"
    if clues.width(r"_blocks_\d+_(linear1|(img|txt)_attn_(qkv|proj))$") in (4096, 6144):
        return "Flux2Transformer2DModel"
    more = [(_DOUBLE, 19), (_SINGLE, 38)]
    found = ((pattern.match(path), most) for path in clues.inputs for pattern, most in more)
    is_longer = any(int(match[1]) >= most for match, most in found if match)
    is_longer = is_longer or clues.has("token_refiner")
    return "HunyuanVideoTransformer3DModel" if is_longer else "FluxTransformer2DModel"


def _one_stream_family(clues: Clues) -> str:
    """Families whose blocks are all `transformer_blocks`, by what they attend to and how wide they are."""
    if clues.has(r"^transformer_blocks_\d+_attn2?_(add_|to_)"):
        blocks = [int(match[1]) for path in clues.inputs if (match := _DOUBLE.match(path))]
        said = f"{clues.header.get('modelspec.architecture')} {clues.header.get('ss_base_model_version')}".lower()
        of_flux = (
            clues.has(
                r"^transformer_blocks_\d+_(ff(_context)?_net|norm1(_context)?_linear)|^(x|context)_embedder$|^time_text_embed_"
            )
            or "flux" in said
        )
        is_wide = clues.width(r"attn_(to|add)_q") == 3072
        if is_wide and of_flux and max(blocks, default=0) < 19:
            return "FluxTransformer2DModel"
        is_qwen = is_wide or max(blocks, default=0) >= 38
        if clues.has(r"^transformer_blocks_\d+_attn_"):
            return "QwenImageTransformer2DModel" if is_qwen else "SD3Transformer2DModel"
    if not clues.has(r"^transformer_blocks_\d+_"):
        return ""
    width = clues.width(r"attn1_to_[qkv]$") or clues.width(r"attn2_to_q$") or clues.width(r"ff_net_0_proj$")
    if not clues.has(r"_attn2_") and width in _WIDTHS_SELF:
        return _WIDTHS_SELF[width]
    return _WIDTHS.get(width, "")


def _unet_family(clues: Clues, tensors: Mapping[str, Tensor]) -> str:
    """Which Stable Diffusion: by the width of its text, by networks and blocks that only one has, by the header."""
    text = clues.width(r"attn2_to_[kv]$")
    if text in _TEXT_WIDTHS:
        return _TEXT_WIDTHS[text]
    base = clues.header.get("ss_base_model_version", "")
    said = clues.header.get("modelspec.architecture", "")
    deep = clues.has(r"attentions_\d+_transformer_blocks_[1-9]|(input|output)_blocks_\d+_1_transformer_blocks_[1-9]")
    if "text_encoder_2" in clues.others or deep or base.startswith("sdxl") or "stable-diffusion-xl" in said:
        return "xl"
    if clues.header.get("ss_v2") == "True" or base.startswith("sd_v2") or "stable-diffusion-v2" in said:
        return "v2"
    encoder = next((t.shape[1] for key, t in tensors.items() if "q_proj" in key and "down" in key and t.ndim > 1), 0)
    return "v2" if encoder == 1024 else "v1"
