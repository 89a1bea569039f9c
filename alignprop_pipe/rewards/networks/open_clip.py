"""What open_clip does otherwise than transformers: the names of a CLIP's weights, and its tokens of a text."""

import html
from collections.abc import Iterator, Mapping
from typing import Any

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
_START, _END = "<start_of_text>", "<end_of_text>"
_WORDS = rf"{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"


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


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text as open_clip's `SimpleTokenizer` makes them, first and last one included, of any length.

    `tokenizer` is a CLIPTokenizer, of which only the vocabulary and the merges are used: its normalizer composes
    letters that were composed before they were made small, and it takes its own marks for marks where they stand in a
    text. open_clip takes its own, `<start_of_text>` and `<end_of_text>`.
    """
    ends = {_START: tokenizer.bos_token_id, _END: tokenizer.eos_token_id}
    return [ends[_START], *_inner_ids(tokenizer.backend_tokenizer.model, cleaned(text), ends), ends[_END]]


def _inner_ids(merges: Any, text: str, ends: Mapping[str, int]) -> Iterator[int]:
    import regex
    from tokenizers.pre_tokenizers import ByteLevel

    letters_of = ByteLevel(add_prefix_space=False, use_regex=False)
    for word in regex.findall(_WORDS, text, regex.IGNORECASE):
        if word in ends:
            yield ends[word]
        else:
            for letters, _ in letters_of.pre_tokenize_str(word):
                yield from (token.id for token in merges.tokenize(letters))


def cleaned(text: str) -> str:
    """A text as open_clip cleans it before it splits it into words.

    Broken Unicode, ligatures, wide letters and curly quotes are mended by ftfy, HTML's names of characters are
    resolved, twice, and blanks joined; lower case.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
