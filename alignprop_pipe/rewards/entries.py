"""The table of the rewards that come with the package. A new scorer is one file and one entry here.

No torch here: the table holds where each reward is, and `make` goes there.
"""

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from alignprop_pipe.bundled import MODELS
from alignprop_pipe.errors import RewardError

if TYPE_CHECKING:
    from alignprop_pipe.rewards.base import Reward

_HERE = "alignprop_pipe.rewards"
_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardEntry:
    """A reward that has a name. `where` is `module:Class`, imported when it is made.

    `summary` says what it measures and `range_text` between which numbers. `weights` are the files of the default
    weights on the Hub, as (repository, file), of `size_mb` in all; `bundled` names the model inside this package that
    is the default instead. `memory_mb` is what the default network fills in float32, without activations. A `judge` is
    only watched. One that `combines` is made of other rewards: `min(clip, jpeg)`. `needs_acceptance` names a licence
    that binds its users: it is made only with `accept_license=True`.
    """

    name: str
    summary: str
    licence: str
    where: str
    size_mb: float = 0.0
    judge: bool = False
    range_text: str = ""
    weights: tuple[tuple[str, str], ...] = ()
    bundled: str = ""
    memory_mb: float = 0.0
    combines: bool = False
    needs_acceptance: str = ""
    registered: "type[Reward] | None" = None
    """The class of a user's own reward; `where` says then where it was registered from."""

    @property
    def here(self) -> bool | None:
        """Whether the default weights are on this machine; None where there are none. Looks into the Hub's cache."""
        if self.bundled:
            return any(model.missing is None for model in MODELS if model.name == self.bundled)
        if not self.weights:
            return None
        from huggingface_hub import try_to_load_from_cache

        return all(isinstance(try_to_load_from_cache(source, file), str) for source, file in self.weights)

    def make(self, *args: Any, **kwargs: Any) -> "Reward":
        """The reward with these arguments. Raises RewardError for arguments that it does not take."""
        module, _, attribute = self.where.partition(":")
        kind = self.registered or getattr(import_module(module), attribute)
        try:
            inspect.signature(kind.__init__).bind(None, *args, **kwargs)
        except TypeError as error:
            known = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
            takes = f"it takes: {', '.join(known)}" if known else "it takes no arguments"
            raise RewardError(f"reward {self.name!r}: {error}; {takes}") from error
        return kind(*args, **kwargs)


ENTRIES: tuple[RewardEntry, ...] = (
    RewardEntry(
        name="clip",
        summary="agreement of picture and prompt: by a CLIP or SigLIP model (the bundled one: emoji; else model=...)",
        licence="bundled weights: Apache-2.0",
        where=f"{_HERE}.networks.clip:ClipScore",
        range_text="-1 to 1; CLIP-L on photographs: 0.2 to 0.35",
        bundled="emoji-scorer",
        memory_mb=2.2,
    ),
    RewardEntry(
        name="jpeg",
        summary="compressibility: minus what JPEG loses of the picture; -jpeg asks for rich detail; logs jpeg_kb",
        licence="no weights",
        where=f"{_HERE}.scorers.jpeg:Jpeg",
        range_text="about -0.2 (noise) to 0 (flat)",
    ),
    RewardEntry(
        name="ask",
        summary='any property that can be asked: log-odds of "yes" to "no" for ask("is the dog wearing a hat?"); for '
        'emoji pictures model="emoji" is bundled: ask("does the picture show {prompt}?", model="emoji")',
        licence="BSD-3-Clause; bundled weights: Apache-2.0",
        where=f"{_HERE}.scorers.ask:Ask",
        range_text="about -10 to 10, 0 is undecided",
        size_mb=1540,
        weights=(("Salesforce/blip-vqa-base", "model.safetensors"),),
        memory_mb=1378,
    ),
    RewardEntry(
        name="imagereward",
        summary="how well people would like the picture for its prompt, learnt from their rankings (ImageReward)",
        licence="Apache-2.0",
        where=f"{_HERE}.scorers.imagereward:ImageReward",
        range_text="about -2 to 2, 0 on average",
        size_mb=1790,
        weights=(("THUDM/ImageReward", "ImageReward.pt"), ("google-bert/bert-base-uncased", "vocab.txt")),
        memory_mb=1707,
    ),
    RewardEntry(
        name="aesthetic",
        summary="how beautiful people would find the picture: LAION's aesthetic predictor v2 on CLIP-L/14",
        licence="head: Apache-2.0; CLIP: MIT",
        where=f"{_HERE}.scorers.aesthetic:Aesthetic",
        range_text="about 1 to 10, most pictures 4 to 7",
        size_mb=1714,
        weights=(
            ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
            ("openai/clip-vit-large-patch14", "model.safetensors"),
        ),
        memory_mb=1217,
    ),
    RewardEntry(
        name="hpsv2.1",
        summary="which picture people prefer for a prompt: HPSv2.1, a CLIP ViT-H/14",
        licence="Apache-2.0",
        where=f"{_HERE}.scorers.hpsv2:HpsV21",
        range_text="cosine; 0.2 to 0.35",
        size_mb=1976,
        weights=(("xswu/HPSv2", "HPS_v2.1_compressed.pt"), (_VIT_H, "tokenizer.json")),
        memory_mb=3944,
    ),
    RewardEntry(
        name="hpsv2",
        summary="HPSv2 before version 2.1, for comparing with published numbers; the two are on different scales",
        licence="Apache-2.0",
        where=f"{_HERE}.scorers.hpsv2:HpsV2",
        range_text="cosine; 0.2 to 0.35",
        size_mb=1976,
        weights=(("xswu/HPSv2", "HPS_v2_compressed.pt"), (_VIT_H, "tokenizer.json")),
        memory_mb=3944,
    ),
    RewardEntry(
        name="pickscore",
        summary="which picture people would pick for a prompt: PickScore, a CLIP ViT-H/14",
        licence="MIT",
        where=f"{_HERE}.scorers.pickscore:PickScore",
        range_text="about 17 to 24; 1 more is picked 73 times in 100",
        size_mb=3948,
        weights=(("yuvalkirstain/PickScore_v1", "model.safetensors"),),
        memory_mb=3944,
    ),
    RewardEntry(
        name="aesthetic2.5",
        summary="as aesthetic, also for drawings: aesthetic predictor v2.5 on SigLIP; model=FILE names its head",
        licence="head: AGPL-3.0, only with accept_license=True; SigLIP: Apache-2.0",
        where=f"{_HERE}.scorers.aesthetic:Aesthetic25",
        range_text="1 to 10; 5.5 and more is very good",
        size_mb=3516,
        weights=(("google/siglip-so400m-patch14-384", "model.safetensors"),),
        memory_mb=1713,
        needs_acceptance="AGPL-3.0",
    ),
    RewardEntry(
        name="count",
        summary='as many objects as wanted, by a detector: count("dog", 2), count({"dog": 2}), the prompt set\'s '
        'columns, or the prompt\'s own words; for real pictures model="google/owlv2-base-patch16-ensemble" (any '
        'object, 620 MB) or "hustvl/yolos-tiny" (COCO\'s 80, 26 MB)',
        licence="bundled weights, OWLv2 and YOLOS: Apache-2.0",
        where=f"{_HERE}.objects.count:Count",
        range_text="0 (certainly right) downwards: the logarithm of a probability",
        bundled="emoji-detector",
        memory_mb=1.1,
    ),
    RewardEntry(
        name="contains",
        summary='the object is there, by a detector: contains("dog"), contains(["dog", "ball"]), columns or words; '
        'for real pictures model="google/owlv2-base-patch16-ensemble" (620 MB) or "hustvl/yolos-tiny" (26 MB)',
        licence="bundled weights, OWLv2 and YOLOS: Apache-2.0",
        where=f"{_HERE}.objects.count:Contains",
        range_text="0 (certainly there) downwards: the logarithm of a probability",
        bundled="emoji-detector",
        memory_mb=1.1,
    ),
    RewardEntry(
        name="without",
        summary='the object is not there, by a detector: without("person"), columns or words; for real pictures '
        'model="google/owlv2-base-patch16-ensemble" (620 MB) or "hustvl/yolos-tiny" (26 MB)',
        licence="bundled weights, OWLv2 and YOLOS: Apache-2.0",
        where=f"{_HERE}.objects.count:Without",
        range_text="0 (certainly absent) downwards: the logarithm of a probability",
        bundled="emoji-detector",
        memory_mb=1.1,
    ),
    RewardEntry(
        name="likeness",
        summary="is it like the base model's pictures in light, contrast, colour, detail; a judge",
        licence="no weights",
        where=f"{_HERE}.scorers.likeness:Likeness",
        judge=True,
        range_text="0 to 1 (as the base model draws: about 0.7)",
    ),
    RewardEntry(
        name="brightness",
        summary="mean luma",
        licence="no weights",
        where=f"{_HERE}.scorers.simple:Brightness",
        range_text="0 (black) to 1 (white)",
    ),
    RewardEntry(
        name="colour",
        summary="colourfulness after Hasler and Suesstrunk",
        licence="no weights",
        where=f"{_HERE}.scorers.simple:Colour",
        range_text="0 (grey) to about 1; vivid photographs: 0.4",
    ),
    RewardEntry(
        name="sharpness",
        summary="variance of the Laplacian of the luma",
        licence="no weights",
        where=f"{_HERE}.scorers.simple:Sharpness",
        range_text="0 (flat) to 16 (a chessboard of pixels)",
    ),
    RewardEntry(
        name="tv",
        summary="total variation: mean step between neighbouring pixels; -tv makes pictures calm",
        licence="no weights",
        where=f"{_HERE}.scorers.simple:TotalVariation",
        range_text="0 (flat) to 2",
    ),
    RewardEntry(
        name="symmetry",
        summary="minus the squared difference between left and right",
        licence="no weights",
        where=f"{_HERE}.scorers.simple:Symmetry",
        range_text="-1 to 0 (mirror-symmetric)",
    ),
    RewardEntry(
        name="emoji_judge",
        summary="is everything right that the emoji prompt names; a judge, never trained on",
        licence="bundled weights: Apache-2.0",
        where=f"{_HERE}.scorers.judge:AttributeJudge",
        judge=True,
        range_text="1 (all of it) or 0",
        bundled="emoji-judge",
        memory_mb=1.3,
    ),
    RewardEntry(
        name="zscore",
        summary="a reward in standard deviations from the base model's mean, measured at the start: zscore(clip)",
        licence="no weights",
        where=f"{_HERE}.combine:ZScore",
        range_text="about -3 to 3 for the base model's pictures",
        combines=True,
    ),
    RewardEntry(
        name="scaled",
        summary="a reward between the base model's 5th and 95th percentile, measured at the start: scaled(clip)",
        licence="no weights",
        where=f"{_HERE}.combine:Scaled",
        range_text="0 to 1 for nine in ten of the base model's pictures",
        combines=True,
    ),
    RewardEntry(
        name="min",
        summary="all of them at once, the smallest score counts: min(zscore(clip), zscore(jpeg))",
        licence="no weights",
        where=f"{_HERE}.combine:Min",
        range_text="that of the rewards inside",
        combines=True,
    ),
    RewardEntry(
        name="softmin",
        summary="all of them at once, smoothly: softmin(zscore(clip), zscore(jpeg), temperature=1.0)",
        licence="no weights",
        where=f"{_HERE}.combine:SoftMin",
        range_text="between the smallest of the rewards inside and their mean",
        combines=True,
    ),
    RewardEntry(
        name="clip_above",
        summary="good enough at a value, where the gradient stops: clip_above(zscore(clip), 2)",
        licence="no weights",
        where=f"{_HERE}.combine:ClipAbove",
        range_text="that of the reward inside, up to the value",
        combines=True,
    ),
    RewardEntry(
        name="smooth",
        summary="harder to fool, the mean over moved and noisy views of each picture: smooth(clip, views=4)",
        licence="no weights",
        where=f"{_HERE}.smooth:Smooth",
        range_text="that of the reward inside",
        combines=True,
    ),
    RewardEntry(
        name="watch",
        summary="logged in training, never trained on: clip + watch(jpeg)",
        licence="no weights",
        where=f"{_HERE}.combine:Watch",
        range_text="0; what it watches is logged",
        combines=True,
    ),
    RewardEntry(
        name="python",
        summary="your own: module:function or file.py:function, called with images (and prompts, and targets)",
        licence="yours",
        where=f"{_HERE}.scorers.python:PythonReward",
        range_text="that of your function",
    ),
)
