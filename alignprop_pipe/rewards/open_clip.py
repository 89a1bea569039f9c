"""What open_clip does otherwise than transformers: the names of a CLIP's weights, and the cleaning of texts."""

import html
from collections.abc import Mapping

from torch import Tensor

_NAMES = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
_FRONTS = {
    "ln_final.": "text_model.final_layer_norm.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # spelt so in transformers
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
}
_INSIDE = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_MARK = "visual.class_embedding"
_LEFT_OUT = ("attn_mask", "position_ids")


def clip_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under CLIPModel's names; those that have them already stay. Unknown names are kept as they came."""
    front = next((name.removesuffix(_MARK) for name in tensors if name.endswith(_MARK)), None)
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_LEFT_OUT):  # tables that older versions kept in the file
            continue
        named.update({name: tensor} if front is None else _renamed(name.removeprefix(front), tensor))
    return named


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name in _NAMES:
        # Projections are stored as x @ W there, as Linear weights here.
        turned = name in ("text_projection", "visual.proj")
        return {_NAMES[name]: tensor.T.contiguous() if turned else tensor}
    for old, new in _FRONTS.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in _INSIDE.items():
        name = name.replace(old, new)
    layer, inside, kind = name.partition(".attn.in_proj_")
    if not inside:
        return {name: tensor}
    parts = zip("qkv", tensor.chunk(3), strict=True)  # query, key and value are one matrix there
    return {f"{layer}.self_attn.{part}_proj.{kind}": piece.contiguous() for part, piece in parts}


def cleaned(text: str) -> str:
    """A text as open_clip's tokenizer cleans it before it splits it into tokens (`SimpleTokenizer`, as OpenAI's CLIP).

    Broken Unicode, ligatures, wide letters and curly quotes are mended by ftfy, HTML's names of characters are
    resolved, twice, and blanks joined; lower case. The tokenizers of transformers do not do the first two.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
