"""Detectors: pictures and names of objects in, boxes and log-odds out, with the gradient kept.

`OpenDetector` is OWLv2 (arXiv 2306.09683), which takes any name as text; `ClosedDetector` is YOLOS (arXiv 2106.00666),
which knows the names that it was trained on. The model's own config.json decides which it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images
from alignprop_pipe.rewards.networks.preprocess import Preprocess, Resized, resize
from alignprop_pipe.rewards.networks.pretrained import (
    load_config,
    load_network,
    load_preprocessor_config,
    load_tokenizer,
)
from alignprop_pipe.rewards.objects.targets import known_name

QUERY = "a photo of a {}"
KEPT_NAMES = 4096
THRESHOLDS = {"owlv2": 0.2, "yolos": 0.5}
SHARPNESS = 2.0

Matrix = Float[Tensor, "new_length length"]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Boxes in shares of the picture (left, top, right, bottom), and for each name the log-odds that it is in a box."""

    logits: Float[Tensor, "batch names boxes"]
    boxes: Float[Tensor, "batch boxes 4"]


class Detector(nn.Module):
    """A frozen detection network with its preprocessing: `detector(images, names)` gives `Candidates`.

    `threshold` is the probability at which a box is as likely an object as not, and `sharpness` multiplies the
    log-odds that are counted: both can be set in the model's config.json (detection_threshold, detection_sharpness).
    """

    vocabulary: tuple[str, ...] | None = None
    """The names that the network learnt; None where any will do."""

    def __init__(self, network: Any, source: str) -> None:
        super().__init__()
        self.network, self.source = network, source
        config = network.config
        default = THRESHOLDS[config.model_type]
        self.threshold = float(getattr(config, "detection_threshold", default))
        self.sharpness = float(getattr(config, "detection_sharpness", SHARPNESS))
        if not 0 < self.threshold < 1 or not self.sharpness > 0:
            raise RewardError(
                f"config.json in {source!r} has detection_threshold {self.threshold} and detection_sharpness "
                f"{self.sharpness}: a number between 0 and 1, and one above 0, are needed"
            )

    def forward(self, images: Images, names: Sequence[str]) -> Candidates:
        """Detect in float32 or float64 `images` in [0, 1], any size. Raises RewardError for a name it can't take."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(images, names)")

    def known(self, name: str) -> str:
        """The detector's word for the object. Raises RewardError."""
        return known_name(name, self.vocabulary, self.source)


class OpenDetector(Detector):
    """OWLv2: a box for every patch, compared with the text of each name put into `template`."""

    def __init__(
        self, network: Any, source: str, recipe: Mapping[str, Any], tokenizer: Any, template: str | None
    ) -> None:
        super().__init__(network, source)
        self.pixels = SquarePixels.from_config(recipe)
        self.tokenizer = tokenizer
        known = network.config.text_config.vocab_size
        # Without its file transformers makes an empty tokenizer, to which all names are the same.
        if len(tokenizer) < known:
            raise RewardError(
                f"the tokenizer of {source!r} knows {len(tokenizer)} tokens and the network {known}: tokenizer.json, "
                "or vocab.json with merges.txt, is missing or damaged; get it again"
            )
        self.template = template or str(getattr(network.config, "query_template", QUERY))
        if "{}" not in self.template:
            raise RewardError(
                f'the query template {self.template!r} has no place for the name; write for example "a {{}}"'
            )
        learnt = getattr(network.config, "vocabulary", None)
        self.vocabulary = tuple(learnt) if learnt else None
        self._texts: dict[tuple[str, torch.dtype], Tensor] = {}

    def forward(self, images: Images, names: Sequence[str]) -> Candidates:
        texts = torch.stack([self._text(name) for name in names]).to(self.network.device)
        pixels = self.pixels(images).to(self.network.dtype)
        # By its parts: the whole forward pass would read the texts anew for each picture, and round float64 down.
        patches, _ = self.network.image_embedder(pixel_values=pixels)
        features = patches.flatten(1, 2)
        logits, _ = self.network.class_predictor(features, texts.expand(len(images), -1, -1))
        boxes = self.network.box_predictor(features, patches)
        return Candidates(logits.mT.to(images), corners(boxes.to(images)))

    def _text(self, name: str) -> Tensor:
        """The embedding of one query. Each is computed alone, so that it does not depend on its neighbours."""
        key = (name, self.network.dtype)
        if key not in self._texts:
            limit = self.network.config.text_config.max_position_embeddings
            tokens = self.tokenizer([self.template.replace("{}", name)], return_tensors="pt")
            if tokens["input_ids"].shape[1] > limit:
                raise RewardError(f"the name {name!r} is longer than the {limit} tokens that {self.source!r} can read")
            features = self.network.owlv2.get_text_features(**tokens.to(self.network.device))
            if len(self._texts) >= KEPT_NAMES:
                del self._texts[next(iter(self._texts))]
            # transformers 5 returns an object, 4 the tensor itself
            self._texts[key] = (features if isinstance(features, Tensor) else features.pooler_output)[0]
        return self._texts[key]


class ClosedDetector(Detector):
    """YOLOS: a hundred or so boxes, each with probabilities for all the names of `config.id2label` and for nothing."""

    def __init__(self, network: Any, source: str, recipe: Mapping[str, Any]) -> None:
        super().__init__(network, source)
        self.pixels = EdgePixels.from_config(recipe)
        labels = {label.lower(): int(index) for index, label in network.config.id2label.items() if label != "N/A"}
        self.labels, self.vocabulary = labels, tuple(labels)

    def forward(self, images: Images, names: Sequence[str]) -> Candidates:
        out = self.network(pixel_values=self.pixels(images).to(self.network.dtype))
        raw = out.logits.to(images)
        wanted = torch.tensor([self.labels[self.known(name)] for name in names], device=raw.device)
        # log p/(1-p) of a softmax: its logit against all others together.
        own = F.one_hot(wanted, raw.shape[-1]).bool()
        others = raw[:, None].masked_fill(own[None, :, None], -torch.inf).logsumexp(dim=-1)
        return Candidates(raw[..., wanted].mT - others, corners(out.pred_boxes.to(images)))


def load_detector(source: str, revision: str | None = None, template: str | None = None) -> Detector:
    """The detector in a transformers folder or on the Hub, frozen, on the CPU. Raises RewardError."""
    import transformers

    config = load_config(source, revision)
    if config.model_type not in THRESHOLDS:
        raise RewardError(
            f"{source!r} is a model of the type {config.model_type!r}; a detector is needed: OWLv2, such as "
            "google/owlv2-base-patch16-ensemble, or YOLOS, such as hustvl/yolos-tiny"
        )
    recipe = load_preprocessor_config(source, revision)
    if config.model_type == "owlv2":
        network = load_network(transformers.Owlv2ForObjectDetection, source, revision)
        return OpenDetector(network, source, recipe, load_tokenizer(source, revision), template)
    if template is not None:
        raise RewardError(f"{source!r} knows a fixed list of names and reads no text: leave template={template!r} out")
    return ClosedDetector(load_network(transformers.YolosForObjectDetection, source, revision), source, recipe)


def corners(boxes: Tensor) -> Tensor:
    """Centre, width, height -> left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


# --- preprocessing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SquarePixels:
    """OWLv2's: black below or to the right up to a square, a Gaussian blur where it shrinks, linear interpolation."""

    size: tuple[int, int]
    recipe: Preprocess
    pad: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "SquarePixels":
        recipe = Preprocess.from_config({**config, "do_center_crop": False})
        if not isinstance(recipe.size, tuple):
            raise RewardError("preprocessor_config.json of an OWLv2 model needs a size with height and width")
        return cls(recipe.size, recipe, pad=bool(config.get("do_pad", True)))

    def __call__(self, images: Images) -> Resized:
        height, width = images.shape[-2:]
        side = max(height, width)
        if self.pad:
            images = F.pad(images, (0, side - width, 0, side - height))
        for dim, length in ((-2, self.size[0]), (-1, self.size[1])):
            if images.shape[dim] != length:
                weights = axis_weights(images.shape[dim], length).to(images)
                images = weights @ images if dim == -2 else images @ weights.mT
        return normalised(images, self.recipe)


@lru_cache(maxsize=4)  # a matrix of a large picture has megabytes
def axis_weights(length: int, new_length: int) -> Matrix:
    """How much each old row gives to each new one: scipy's gaussian_filter, then zoom with grid_mode, both mirrored."""
    factor = length / new_length
    weights = torch.eye(length, dtype=torch.float64)
    sigma = max(0.0, (factor - 1) / 2)
    reach = int(4 * sigma + 0.5)
    rows = torch.arange(length)[:, None]
    if reach:
        steps = torch.arange(-reach, reach + 1)
        bell = torch.softmax(-((steps.double() / sigma) ** 2) / 2, dim=0)
        weights = torch.zeros_like(weights).scatter_add_(1, mirrored(rows + steps, length), bell.expand(length, -1))
    places = (torch.arange(new_length, dtype=torch.float64)[:, None] + 0.5) * factor - 0.5
    below = places.floor()
    shares = torch.cat([1 - (places - below), places - below], dim=1)
    nearest = mirrored(below.long() + torch.arange(2), length)
    return torch.zeros(new_length, length, dtype=torch.float64).scatter_add_(1, nearest, shares) @ weights


def mirrored(places: Tensor, length: int) -> Tensor:
    """Places outside 0 ... length - 1 reflected at the first and the last."""
    period = max(2 * (length - 1), 1)
    return (places % period).minimum(period - places % period) if length > 1 else torch.zeros_like(places)


@dataclass(frozen=True, slots=True)
class EdgePixels:
    """YOLOS's: the shorter side to `shortest`, unless the longer one would pass `longest`; multiples of 16 pixels."""

    shortest: int | None
    longest: int | None
    fixed: tuple[int, int] | None
    recipe: Preprocess

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "EdgePixels":
        recipe = Preprocess.from_config({"resample": 2, **config, "do_center_crop": False})
        if not isinstance(recipe.size, int):
            return cls(None, None, recipe.size, recipe)
        size = config["size"]
        # Older files have "max_size" next to a plain number; 1333 is what the image processor takes without.
        longest = size.get("longest_edge") if isinstance(size, Mapping) else config.get("max_size", 1333)
        return cls(recipe.size, None if longest is None else int(longest), None, recipe)

    def __call__(self, images: Images) -> Resized:
        return normalised(resize(images, self.target(*images.shape[-2:]), self.recipe.resample), self.recipe)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The new height and width, rounded as the image processor rounds."""
        if self.shortest is None:
            return self.fixed or (height, width)
        low, high = sorted((height, width))
        size, exact = self.shortest, float(self.shortest)
        if self.longest is not None and high / low * size > self.longest:
            exact = self.longest * low / high
            size = round(exact)
        kept = width >= height == size
        sides = (height, width) if kept else [size if x == low else int(exact * x / low) for x in (height, width)]
        return max(sides[0] // 16, 1) * 16, max(sides[1] // 16, 1) * 16


def normalised(images: Tensor, recipe: Preprocess) -> Tensor:
    """Minus the mean, by the standard deviation, colour by colour."""
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (recipe.mean, recipe.std))
    return (images - mean) / std
