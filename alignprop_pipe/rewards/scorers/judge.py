"""The judge of the bundled model: names subject, count and background of a picture. Watched, never trained on."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignprop_pipe.bundled import bundled_path
from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images, Rewards, Targets
from alignprop_pipe.rewards.entries import RewardEntry
from alignprop_pipe.rewards.networks.network import NetworkReward
from alignprop_pipe.rewards.networks.preprocess import Preprocess
from alignprop_pipe.rewards.networks.pretrained import load_network, load_preprocessor_config

_NUMERALS = {"1": "one", "2": "two", "3": "three", "4": "four"}


class AttributeJudge(NetworkReward):
    """1.0 for a picture where every attribute that its targets name is right, else 0.0.

    `model` is a transformers image classifier whose labels are `attribute:value` ("subject:dog"); "emoji" is the
    bundled judge with subject, count and background. The extras hold 1.0 or 0.0 for each attribute.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import AttributeJudge
        >>> targets = {"subject": ["fox"], "count": ["one"], "background": ["red"]}
        >>> AttributeJudge()(torch.zeros(1, 3, 64, 64), ["one fox on a red background"], targets).total
        tensor([0.])
    """

    name = "emoji_judge"
    entry = RewardEntry(
        summary="is everything right that the emoji prompt names; a judge, never trained on",
        licence="bundled weights: Apache-2.0",
        judge=True,
        range_text="1 (all of it) or 0",
        bundled="emoji-judge",
        memory_mb=1.3,
    )
    sources = ("model",)
    trainable = False
    reads_prompts = False

    def __init__(self, model: str | Path = "emoji", revision: str | None = None) -> None:
        super().__init__(model, revision)

    def load(self) -> nn.Module:
        from transformers import AutoModelForImageClassification

        source = str(bundled_path("emoji-judge")) if self.model == "emoji" else self.model
        self._preprocess = Preprocess.from_config(load_preprocessor_config(source, self.revision))
        return load_network(AutoModelForImageClassification, source, self.revision)

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        right = self._right(images, targets)
        # What a prompt does not say cannot be wrong.
        return torch.stack([column.nan_to_num(1.0) for column in right.values()]).amin(dim=0)

    def extras(self, images: Images, prompts: list[str], targets: Targets) -> Mapping[str, Tensor]:
        right = self._right(images, targets)
        return {f"{self.name}.{name}": column for name, column in right.items() if not column.isnan().any()}

    def predict(self, images: Images) -> dict[str, list[str]]:
        """The likeliest value of each attribute, one per image."""
        network = self.network_for(images)
        logits = network(pixel_values=self._preprocess(images.detach())).logits
        best = {}
        for attribute, labels in _groups(self.model, network.config.id2label).items():
            values = list(labels)
            chosen = logits[:, [labels[value] for value in values]].argmax(dim=1)
            best[attribute] = [values[index] for index in chosen.tolist()]
        return best

    def asked(self, network: Any, targets: Mapping[str, Sequence[Any]]) -> dict[str, list[str | None]]:
        """What each prompt wants of each attribute, in the judge's words. Raises RewardError where it cannot say."""
        groups = _groups(self.model, network.config.id2label)
        columns = {name: targets[name] for name in groups if name in targets}
        asked = {name: [_known(name, value, groups[name]) for value in column] for name, column in columns.items()}
        if not asked or not all(any(values) for values in zip(*asked.values(), strict=True)):
            raise RewardError(
                f"{self.name} compares a picture with what its prompt asks for: every prompt needs a value in one or "
                f"more of the columns {', '.join(groups)}; the columns that came: {', '.join(targets) or 'none'}"
            )
        return asked

    def _right(self, images: Images, targets: Targets) -> dict[str, Rewards]:
        """For each attribute that is asked for: 1.0 right, 0.0 wrong, NaN where a prompt's target is None."""
        asked = self.asked(self.network_for(images), targets)
        right = {}
        for name, said in self.predict(images).items():
            if name in asked:
                pairs = zip(asked[name], said, strict=True)
                right[name] = images.new_tensor(
                    [math.nan if wanted is None else wanted == got for wanted, got in pairs]
                )
        return right


def knows(targets: Mapping[str, Sequence[Any]]) -> bool:
    """Whether the bundled judge could check every prompt of a set with these targets."""
    judge = AttributeJudge()
    try:
        return bool(judge.asked(judge.network_for(torch.zeros(1)), targets))
    except RewardError:
        return False


def _groups(source: str, labels: Mapping[Any, str]) -> dict[str, dict[str, int]]:
    """`{"0": "subject:dog", ...}` -> attribute -> value -> index."""
    groups: dict[str, dict[str, int]] = {}
    for index, label in labels.items():
        attribute, colon, value = label.partition(":")
        if not colon:
            raise RewardError(f"{source!r} has a label {label!r}; a judge needs labels such as 'subject:dog'")
        groups.setdefault(attribute, {})[value] = int(index)
    return groups


def _known(attribute: str, wanted: Any, values: Mapping[str, int]) -> str | None:
    """The target as the judge says it: 2 is "two". Raises RewardError for one that it never learnt."""
    if wanted is None:
        return None
    text = str(wanted).strip().lower()
    text = text if text in values else _NUMERALS.get(text, text)
    if text not in values:
        raise RewardError(f"the judge knows no {attribute} {wanted!r}; it knows: {', '.join(values)}")
    return text
