"""Number, presence and absence of objects, by a detector: log P(N = wanted), log P(N >= 1), log P(N = 0).

A thresholded box has no slope, so every box is an object with a probability. Duplicates give way to stronger boxes
that cover them: non-maximum suppression with a smooth step in place of the threshold of overlap. What is left is
taken as independent, and N, the number of objects, then has an exact distribution (Poisson-binomial), computed in
logarithms: where a picture is far from right, the slope stays and does not explode.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from alignprop_pipe.bundled import bundled_path
from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images, Rewards, Targets
from alignprop_pipe.rewards.entries import RewardEntry
from alignprop_pipe.rewards.networks.network import NetworkReward
from alignprop_pipe.rewards.objects.detector import Detector, load_detector
from alignprop_pipe.rewards.objects.targets import Columns, absent_for, counts_for, counts_from, names_from, present_for

MOST_BOXES = 100
"""Boxes of one name that are looked at in a picture, the likeliest first."""
OVERLAP = 0.5
"""Intersection over union above which two boxes show one object, and below which they show two."""
STEEPNESS = 30.0
"""Of the step at `OVERLAP`: an overlap of 0.6 leaves 5 % of the weaker box, one of 0.4 takes 5 % away."""
NEVER = -1e30
"""The logarithm of no probability at all; minus infinity has no slope."""

Boxes = Float[Tensor, "pairs boxes 4"]
PerBox = Float[Tensor, "pairs boxes"]
PerPair = Float[Tensor, " pairs"]
Numbers = Int[Tensor, " pairs"]
Right = Bool[Tensor, " pairs"]


@dataclass(frozen=True, slots=True)
class Seen:
    """Log-probabilities that a box is an object of its own, and that it is none; strongest boxes first."""

    on: PerBox
    off: PerBox


@dataclass(frozen=True, slots=True)
class Detected:
    """What the detector said of a batch: one row for each name that is asked for in each picture."""

    images: Images
    picture: Numbers
    number: Numbers
    logits: PerBox
    boxes: Boxes

    def is_of(self, images: Tensor) -> bool:
        """Whether it was seen in these very pictures."""
        return images.shape == self.images.shape and torch.equal(images.to(self.images), self.images)

    def detached(self) -> "Detected":
        return Detected(self.images.detach(), self.picture, self.number, self.logits.detach(), self.boxes.detach())


class ObjectReward(NetworkReward):
    """Base of `count`, `contains` and `without`: 0 for certainly right, downwards; the mean over the names asked for.

    Args:
        model: OWLv2 (any name) or YOLOS (80 names of COCO), by Hub id or folder; "emoji" is the bundled detector.
        revision: branch, tag or commit on the Hub.
        threshold: probability at which a box is as likely an object as not; None takes the model's own
            (config.json's detection_threshold, else 0.2 for OWLv2 and 0.5 for YOLOS).
        template: the query for OWLv2, with {} for the name; None takes the model's own (config.json's query_template,
            else "a photo of a {}").
        dtype: number format of the network: "float32", "bfloat16" or "float16".
        offload: keep the network in main memory between scores.

    The gradient is that of the score as it stands, through probabilities and boxes. The extras `NAME.detected` and
    `NAME.right` are not trained on: how many objects are left after ordinary non-maximum suppression at the
    threshold, of all names together, and 1.0 or 0.0 for a picture that is right by that measure.
    """

    sources = ("model",)
    for_other_pictures = "google/owlv2-base-patch16-ensemble"

    def __init__(
        self,
        model: str | Path = "emoji",
        revision: str | None = None,
        threshold: float | None = None,
        template: str | None = None,
        dtype: str = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(model, revision, dtype, offload)
        if threshold is not None and not (isinstance(threshold, float) and 0 < threshold < 1):
            raise RewardError(f"{self.name}(threshold={threshold!r}): a number between 0 and 1 is needed")
        self.threshold, self.template = threshold, template
        self._detected: list[Detected] = []  # of the last score, for its extras

    def asked(self, prompt: str, columns: Columns, vocabulary: Collection[str] | None) -> Mapping[str, int]:
        """The names, with numbers, that one picture is asked for. Raises RewardError."""
        raise NotImplementedError(f"{type(self).__name__} must define asked(prompt, columns, vocabulary)")

    def log_probability(self, seen: Seen, number: Numbers) -> PerPair:
        """The logarithm of the probability that a picture is right about one name."""
        raise NotImplementedError(f"{type(self).__name__} must define log_probability(seen, number)")

    def is_right(self, detected: Numbers, number: Numbers) -> Right:
        """Whether a number of detected objects is right."""
        raise NotImplementedError(f"{type(self).__name__} must define is_right(detected, number)")

    def load(self) -> nn.Module:
        source = str(bundled_path("emoji-detector")) if self.model == "emoji" else self.model
        return load_detector(source, self.revision, self.template)

    def rate(self, network: Any, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        detected = self.detect(network, images, self.all_asked(network, prompts, targets))
        seen = suppress(detected.logits, detected.boxes)
        each = self.log_probability(seen, detected.number)
        self._detected = [detected.detached()]
        return mean_by_picture(each, detected.picture, len(images))

    def extras(self, images: Images, prompts: list[str], targets: Targets) -> Mapping[str, Tensor]:
        if not any(detected.is_of(images) for detected in self._detected):
            self.score(images, prompts, targets)
        (kept,) = self._detected
        self._detected = []
        number = hard_counts(kept.logits, kept.boxes)
        right = self.is_right(number, kept.number).to(images.dtype)
        total = torch.zeros(len(images), dtype=images.dtype, device=images.device)
        return {
            f"{self.name}.detected": total.index_add(0, kept.picture, number.to(images.dtype)),
            f"{self.name}.right": 1 - total.index_add(0, kept.picture, 1 - right).clamp(max=1),
        }

    def all_asked(self, detector: Detector, prompts: list[str], targets: Targets) -> list[dict[str, int]]:
        """For each picture the detector's words for what is asked, with numbers."""
        everything = []
        for place, prompt in enumerate(prompts):
            columns = {name: column[place] for name, column in targets.items()}
            known: dict[str, int] = {}
            for name, number in self.asked(prompt, columns, detector.vocabulary).items():
                word = detector.known(name)
                known[word] = known.get(word, 0) + number
            everything.append(known)
        return everything

    def detect(self, detector: Detector, images: Images, asked: list[dict[str, int]]) -> Detected:
        """The likeliest boxes of each name in each picture, and their log-odds by the threshold."""
        names = sorted({name for known in asked for name in known})
        candidates = detector(images, names)
        pairs = [(place, names.index(name), known[name]) for place, known in enumerate(asked) for name in known]
        picture, name, number = torch.tensor(pairs, device=images.device).unbind(dim=1)
        found = candidates.logits[picture, name].topk(min(MOST_BOXES, candidates.logits.shape[-1]))
        most = found.values.shape[1]
        if int(number.max()) > most:
            raise RewardError(f"{self.name} asks for {int(number.max())} objects; {self.model!r} finds {most} at most")
        boxes = candidates.boxes[picture].gather(1, found.indices[..., None].expand(-1, -1, 4))
        threshold = self.threshold or detector.threshold
        odds = math.log(threshold / (1 - threshold))
        return Detected(images, picture, number, (found.values - odds) * detector.sharpness, boxes)


class Count(ObjectReward):
    """The logarithm of the probability that each object is there as often as wanted.

    What is wanted: `count({"dog": 2, "cat": 1})`, `count("dog", 2)`, `count("two dogs")`; else the prompt set's column
    "count" (a mapping, its JSON text, or a number for the column "subject"); else the prompt's own words.

    Args:
        objects: what is wanted: a name (then `number` says how many), words such as "two dogs and a cat", or
            {"dog": 2, "cat": 1}; None takes what the prompt says.
        number: how many of the one object; None takes the number from `objects`.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import Count, parse_reward
        >>> parse_reward('count({"dog": 2})') == Count({"dog": 2})
        True
        >>> Count()(torch.zeros(1, 3, 64, 64), ["two dogs"]).parts["count.detected"]
        tensor([0.])
    """

    name = "count"
    entry = RewardEntry(
        summary='as many objects as wanted, by a detector: count("dog", 2), count({"dog": 2}), the prompt '
        "set's columns, or the prompt's own words; for real pictures model=\"google/owlv2-base-"
        'patch16-ensemble" (any object, 620 MB) or "hustvl/yolos-tiny" (COCO\'s 80, 26 MB)',
        licence="bundled weights, OWLv2 and YOLOS: Apache-2.0",
        range_text="0 (certainly right) downwards: the logarithm of a probability",
        bundled="emoji-detector",
        memory_mb=1.1,
    )

    def __init__(
        self,
        objects: Mapping[str, int] | str | None = None,
        number: int | None = None,
        model: str | Path = "emoji",
        revision: str | None = None,
        threshold: float | None = None,
        template: str | None = None,
        dtype: str = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(model, revision, threshold, template, dtype, offload)
        if number is not None:
            if not isinstance(objects, str):
                raise RewardError(f'count({objects!r}, {number!r}): one name goes with a number, as in count("dog", 2)')
            objects = {objects: number}
        self.objects = None if objects is None else counts_from(objects, f"count({objects!r})")
        self.reads_prompts = objects is None

    def asked(self, prompt: str, columns: Columns, vocabulary: Collection[str] | None) -> Mapping[str, int]:
        return self.objects or counts_for(prompt, columns, vocabulary)

    def log_probability(self, seen: Seen, number: Numbers) -> PerPair:
        return log_exactly(seen, number)

    def is_right(self, detected: Numbers, number: Numbers) -> Right:
        return detected == number


class Contains(ObjectReward):
    """The logarithm of the probability that each object is there at least once.

    What is wanted: `contains("dog")`, `contains(["dog", "ball"])`; else the prompt set's column "contains" (a name, a
    list, its JSON text, or names with commas) or "subject"; else the prompt's own words.

    Args:
        objects: what has to be there: a name, or several with commas between them; None takes what the prompt says.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import Contains
        >>> bool(Contains("fox")(torch.zeros(1, 3, 64, 64), [""]).total < 0)  # no fox in a black picture
        True
    """

    name = "contains"
    entry = RewardEntry(
        summary='the object is there, by a detector: contains("dog"), contains(["dog", "ball"]), columns or '
        'words; for real pictures model="google/owlv2-base-patch16-ensemble" (620 MB) or '
        '"hustvl/yolos-tiny" (26 MB)',
        licence="bundled weights, OWLv2 and YOLOS: Apache-2.0",
        range_text="0 (certainly there) downwards: the logarithm of a probability",
        bundled="emoji-detector",
        memory_mb=1.1,
    )

    def __init__(
        self,
        objects: str | list[str] | None = None,
        model: str | Path = "emoji",
        revision: str | None = None,
        threshold: float | None = None,
        template: str | None = None,
        dtype: str = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(model, revision, threshold, template, dtype, offload)
        self.objects = None if objects is None else names_from(objects, f"{self.name}({objects!r})")
        self.reads_prompts = objects is None

    def asked(self, prompt: str, columns: Columns, vocabulary: Collection[str] | None) -> Mapping[str, int]:
        return dict.fromkeys(self.objects or present_for(prompt, columns, vocabulary), 1)

    def log_probability(self, seen: Seen, number: Numbers) -> PerPair:
        return log_some(seen)

    def is_right(self, detected: Numbers, number: Numbers) -> Right:
        return detected > 0


class Without(Contains):
    """The logarithm of the probability that none of the objects is there.

    What is unwanted: `without("person")`, `without(["person", "car"])`; else the prompt set's column "without"; else
    the prompt's own words ("a street without cars").

    Args:
        objects: what must not be there: a name, or several with commas between them; None takes what the prompt says.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import Without
        >>> Without("dog")(torch.zeros(1, 3, 64, 64), [""]).parts["without.right"]
        tensor([1.])
    """

    name = "without"
    entry = RewardEntry(
        summary='the object is not there, by a detector: without("person"), columns or words; for real '
        'pictures model="google/owlv2-base-patch16-ensemble" (620 MB) or "hustvl/yolos-tiny" (26 MB)',
        licence="bundled weights, OWLv2 and YOLOS: Apache-2.0",
        range_text="0 (certainly absent) downwards: the logarithm of a probability",
        bundled="emoji-detector",
        memory_mb=1.1,
    )

    def asked(self, prompt: str, columns: Columns, vocabulary: Collection[str] | None) -> Mapping[str, int]:
        return dict.fromkeys(self.objects or absent_for(prompt, columns, vocabulary), 0)

    def log_probability(self, seen: Seen, number: Numbers) -> PerPair:
        return seen.off.sum(dim=1)

    def is_right(self, detected: Numbers, number: Numbers) -> Right:
        return detected == 0


# --- how many objects there are --------------------------------------------------------------------------------------


def suppress(logits: PerBox, boxes: Boxes) -> Seen:
    """Boxes, strongest first, to objects: each is left as far as no stronger box that is left itself covers it.

    As in ordinary non-maximum suppression a covering box counts by its rank and not by its probability, so that five
    boxes of one doubtful object stay one doubtful object.
    """
    iou = overlaps(boxes)
    # Boxes that do not touch are not the same object, not even a little.
    same = (torch.sigmoid(STEEPNESS * (iou - OVERLAP)) * (iou > 0)).tril(diagonal=-1)
    left = torch.zeros_like(logits)
    for box, covers in enumerate(same.unbind(dim=2)):
        left = left + torch.log1p(-covers * left[:, box, None].exp())
    on, off, gone = F.logsigmoid(logits), F.logsigmoid(-logits), -torch.expm1(left)
    # 1 - p * left = (1 - p) + p * (1 - left); nothing has no finite logarithm, and the slope of one would be lost.
    log_gone = torch.where(gone > 0, gone.clamp(min=torch.finfo(gone.dtype).tiny).log(), NEVER)
    return Seen(on + left, torch.logaddexp(off, on + log_gone))


def overlaps(boxes: Boxes) -> Float[Tensor, "pairs boxes boxes"]:
    """Intersection over union of all pairs of boxes."""
    one, other = boxes[:, :, None], boxes[:, None]
    shared = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0)
    intersection = shared.prod(dim=-1)
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)
    return intersection / (area[:, :, None] + area[:, None] - intersection).clamp(min=1e-12)


def log_exactly(seen: Seen, number: Numbers) -> PerPair:
    """Give log P(N = number), box by box: after each, the log-probabilities of 0, 1, ... objects so far."""
    pairs, boxes = seen.on.shape
    counts = torch.full((pairs, int(number.max()) + 1), NEVER, dtype=seen.on.dtype, device=seen.on.device)
    counts[:, 0] = 0
    for box in range(boxes):
        fewer = F.pad(counts[:, :-1], (1, 0), value=NEVER)
        counts = torch.logaddexp(counts + seen.off[:, box, None], fewer + seen.on[:, box, None])
    return counts.gather(1, number[:, None])[:, 0]


def log_some(seen: Seen) -> PerPair:
    """Give log P(N >= 1): some box is the first that is an object."""
    none_before = F.pad(seen.off.cumsum(dim=1)[:, :-1], (1, 0))
    return torch.logsumexp(none_before + seen.on, dim=1)


def hard_counts(logits: PerBox, boxes: Boxes) -> Numbers:
    """How many boxes over the threshold are left by ordinary non-maximum suppression, strongest first."""
    covers = overlaps(boxes) > OVERLAP
    left = logits > 0
    for box in range(logits.shape[1]):
        left[:, box + 1 :] &= ~(left[:, box, None] & covers[:, box, box + 1 :])
    return left.sum(dim=1)


def mean_by_picture(values: PerPair, picture: Numbers, count: int) -> Rewards:
    """The mean of the values that belong to each picture."""
    total = torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, picture, values)
    return total / picture.bincount(minlength=count)
