"""ImageReward: what people would prefer, learnt from their rankings (Xu et al., arXiv 2304.05977).

Images [B, 3, H, W] in [0, 1] and prompts to one score each: about -2 (bad) to 2 (good), 0 on average. A BLIP: a vision
transformer, a BERT that reads the prompt and looks at the picture, and a head without activations.
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images, Rewards, Targets
from alignprop_pipe.rewards.entries import RewardEntry
from alignprop_pipe.rewards.networks.network import NetworkReward
from alignprop_pipe.rewards.networks.preprocess import Preprocess
from alignprop_pipe.rewards.networks.weights import load_into, load_tensors, locate
from alignprop_pipe.seeds import SeededDraws

MODEL, TOKENIZER = "THUDM/ImageReward", "google-bert/bert-base-uncased"
MAX_TOKENS = 35
# The authors' constants that bring raw rewards to mean 0 and deviation 1.
RAW_MEAN, RAW_STD = 0.16717362830052426, 1.0333394966054072
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_TOKENIZER_FILES = ("vocab.txt", "tokenizer.json")
# Weights of BLIP's pretraining that the score does not use, and a table of positions that older files carry.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "text_encoder.embeddings.position_ids")
# Names in the published files -> names in the transformers classes. The BERT's names are the same in both.
_RENAMED = (
    (r"^blip\.visual_encoder\.cls_token$", "visual_encoder.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "visual_encoder.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "visual_encoder.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "visual_encoder.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"visual_encoder.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"visual_encoder.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.", r"visual_encoder.encoder.layers.\1.self_attn."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"visual_encoder.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text_encoder."),
    (r"^mlp\.layers\.", "mlp."),
)


class ImageReward(NetworkReward):
    """How well people would like the picture for its prompt: about -2 to 2, the mean of the authors' data at 0.

    Args:
        model: `THUDM/ImageReward` (the authors' pickle), `RE-N-Y/ImageReward` (the same names as safetensors), or a
            folder or file with either. Sizes are read from the weights. Attention heads are 64 wide, unless a
            med_config.json next to the weights has `num_attention_heads` (or `vision_num_attention_heads`).
        revision: branch, tag or commit of the weights on the Hub.
        dtype: number format of the network: "float32", "bfloat16" or "float16".
        offload: keep the network in main memory between scores.
        tokenizer: Hub id or folder of the BERT tokenizer; by default the one next to the weights, else
            google-bert/bert-base-uncased.

    Examples:
        >>> from alignprop_pipe.rewards import ImageReward, parse_reward
        >>> parse_reward("imagereward") == ImageReward()  # 1.8 GB are downloaded when it scores for the first time
        True
    """

    name = "imagereward"
    entry = RewardEntry(
        summary="how well people would like the picture for its prompt, learnt from their rankings (ImageReward)",
        licence="Apache-2.0",
        size_mb=1790,
        range_text="about -2 to 2, 0 on average",
        weights=(("THUDM/ImageReward", "ImageReward.pt"), ("google-bert/bert-base-uncased", "vocab.txt")),
        memory_mb=1707,
    )
    sources = ("model", "tokenizer")

    def __init__(
        self,
        model: str | Path = MODEL,
        revision: str | None = None,
        dtype: str = "float32",
        offload: bool = False,
        tokenizer: str | Path | None = None,
    ) -> None:
        super().__init__(model, revision, dtype, offload)
        self.tokenizer = None if tokenizer is None else str(tokenizer)
        self._words: Any = None

    def load(self) -> "RankedBlip":
        path = locate(self.model, _file_names(self.model), self.revision)
        self._words = load_words(self.tokenizer or _tokenizer_for(path))
        tensors = _renamed(load_tensors(path))
        network = _empty_network(tensors, path)
        load_into(network, tensors, str(path), ignored=_UNUSED)
        known = network.text_encoder.config.vocab_size
        if not _whole(self._words, known):
            raise RewardError(
                f"the tokenizer {self._words.name_or_path!r} has {len(self._words)} words, with BLIP's two, but the "
                f"weights in {str(path)!r} know {known}: it is damaged, or belongs to other weights; give theirs "
                "(tokenizer=...)"
            )
        return network

    def rate(self, network: "RankedBlip", images: Images, prompts: list[str], targets: Targets) -> Rewards:
        longest = min(MAX_TOKENS, network.text_encoder.config.max_position_embeddings)
        for prompt in prompts:
            self.note_length(prompt, len(self._words(prompt, verbose=False).input_ids), longest)
        # Always as long as the longest, as the authors do it; what is added is masked out.
        tokens = self._words(prompts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
        tokens = tokens.to(images.device)
        raw = network(preprocessed(images, network.side), tokens.input_ids, tokens.attention_mask)
        return (raw.to(images.dtype) - RAW_MEAN) / RAW_STD


class RankedBlip(nn.Module):
    """Picture and tokens -> raw reward: BLIP's two encoders and the head of ImageReward.

    Args:
        vision: a transformers BlipVisionConfig.
        text: a transformers BlipTextConfig, whose decoder layers look at the picture.
        head: shape of each of the head's layers, under its number in the published files, which count dropout too.
    """

    def __init__(self, vision: Any, text: Any, head: Mapping[int, tuple[int, int]]) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.side: int = vision.image_size
        self.visual_encoder = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        # No activations between the layers: they are commented out in the authors' code.
        self.mlp = nn.Sequential(
            OrderedDict((str(place), nn.Linear(wide, thin)) for place, (thin, wide) in head.items())
        )

    def forward(
        self,
        pixels: Float[Tensor, "batch 3 side side"],
        ids: Int[Tensor, "batch tokens"],
        mask: Int[Tensor, "batch tokens"],
    ) -> Float[Tensor, " batch"]:
        """Raw rewards of preprocessed `pixels`, from what the BERT knows at its first token, [CLS]."""
        seen = self.visual_encoder(pixel_values=pixels.to(self.visual_encoder.dtype)).last_hidden_state
        read = self.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return self.mlp(read[:, 0]).squeeze(-1)


def preprocessed(images: Images, side: int) -> Float[Tensor, "batch 3 side side"]:
    """The shorter side resized to `side`, the middle cut out, CLIP's normalisation: the authors' torchvision steps."""
    images = Preprocess(size=side, crop=None, mean=CLIP_MEAN, std=CLIP_STD)(images)
    # Half to even, as torchvision cuts: one pixel away from where transformers cuts, for every fourth size.
    top, left = (round((length - side) / 2) for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def load_words(source: str) -> Any:
    """The BERT tokenizer with BLIP's two additional tokens. Raises RewardError."""
    from transformers import BertTokenizer

    try:
        # Asked for by hand: without any file, BertTokenizer gives a tokenizer that knows no words.
        words = BertTokenizer.from_pretrained(locate(source, _TOKENIZER_FILES).parent)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise RewardError(
            f"imagereward also needs a BERT tokenizer, and {source!r} gave none. On a machine with a network, run "
            f"`hf download {TOKENIZER} vocab.txt --local-dir FOLDER`; bring vocab.txt here, next to the weights, or "
            f"give its folder as imagereward(tokenizer=FOLDER). ({reason})"
        ) from error
    words.add_special_tokens({"bos_token": "[DEC]"})
    words.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return words


def _file_names(source: str) -> tuple[str, ...]:
    """The authors publish a pickle, all others safetensors; the first name is the one that errors tell to get."""
    names = ("ImageReward.pt", "model.safetensors", "ImageReward.safetensors")
    return names if source.lower().startswith(("thudm/", "zai-org/")) else (*names[1:], names[0])


def _tokenizer_for(weights: Path) -> str:
    folder = weights.parent
    return str(folder) if any((folder / name).is_file() for name in _TOKENIZER_FILES) else TOKENIZER


def _whole(words: Any, known: int) -> bool:
    """Whether no word is lost: BERT's own list, which has unused places, is as long as the weights' embedding."""
    if "[unused0]" in words.get_vocab():
        return len(words) == known
    return len(words.all_special_tokens) + 1 < len(words) <= known


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def new_name(name: str) -> str:
        return next((re.sub(old, new, name) for old, new in _RENAMED if re.search(old, name)), name)

    return {new_name(name): tensor for name, tensor in tensors.items()}


def _empty_network(tensors: Mapping[str, Tensor], path: Path) -> RankedBlip:
    """The network of the sizes that the weights have. Raises RewardError when they are no ImageReward."""
    given = _med_config(path)
    try:
        head = {place: _matrix(tensors[f"mlp.{place}.weight"]) for place in _numbers(tensors, r"mlp\.(\d+)\.")}
        with SeededDraws(0):  # the weights that a new network draws are overwritten
            return RankedBlip(_vision_config(tensors, given), _text_config(tensors, given), head)
    except (LookupError, ValueError, TypeError) as error:
        raise RewardError(
            f"{str(path)!r} holds no ImageReward: names such as blip.visual_encoder.pos_embed, "
            "blip.text_encoder.embeddings.word_embeddings.weight and mlp.layers.0.weight are needed, of sizes that "
            f"fit each other ({type(error).__name__}: {error})"
        ) from error


def _vision_config(tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Any:
    from transformers import BlipVisionConfig

    width, _, patch, _ = tensors["visual_encoder.embeddings.patch_embedding.weight"].shape
    patches = tensors["visual_encoder.embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["visual_encoder.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=1 + _numbers(tensors, r"visual_encoder\.encoder\.layers\.(\d+)\.")[-1],
        num_attention_heads=int(given.get("vision_num_attention_heads", max(1, width // 64))),
        image_size=math.isqrt(patches) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # the authors'; the default of the class is 1e-5
    )


def _text_config(tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Any:
    from transformers import BlipTextConfig

    vocabulary, width = tensors["text_encoder.embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=tensors["text_encoder.encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=tensors["text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=1 + _numbers(tensors, r"text_encoder\.encoder\.layer\.(\d+)\.")[-1],
        num_attention_heads=int(given.get("num_attention_heads", max(1, width // 64))),
        max_position_embeddings=tensors["text_encoder.embeddings.position_embeddings.weight"].shape[0],
        hidden_act=given.get("hidden_act", "gelu"),
        layer_norm_eps=float(given.get("layer_norm_eps", 1e-12)),
        # The tokens that BLIP adds stand at the end; they are not used here, but must be in the vocabulary.
        bos_token_id=vocabulary - 2,
        sep_token_id=None,
        eos_token_id=None,
    )


def _numbers(tensors: Mapping[str, Tensor], pattern: str) -> list[int]:
    return sorted({int(found[1]) for name in tensors if (found := re.match(pattern, name))})


def _matrix(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns


def _med_config(weights: Path) -> dict[str, Any]:
    beside = weights.parent / "med_config.json"
    if not beside.is_file():
        return {}
    try:
        return dict(json.loads(beside.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RewardError(f"{str(beside)!r} is damaged or cut short: get it again ({error})") from error
