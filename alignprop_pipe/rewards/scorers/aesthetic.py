"""Aesthetic scorers: a frozen picture tower, its embedding at length 1, and a chain of linear layers to one number.

`aesthetic` is LAION's predictor v2 on CLIP ViT-L/14, `aesthetic2.5` the predictor v2.5 on SigLIP. Images [B, 3, H, W]
in [0, 1]; prompts make no difference.
"""

import dataclasses
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images, Rewards, Targets
from alignprop_pipe.rewards.entries import RewardEntry
from alignprop_pipe.rewards.networks.clip import load_towers, unit
from alignprop_pipe.rewards.networks.network import NetworkReward
from alignprop_pipe.rewards.networks.preprocess import Preprocess
from alignprop_pipe.rewards.networks.pretrained import load_preprocessor_config
from alignprop_pipe.rewards.networks.weights import load_into, load_tensors, locate
from alignprop_pipe.sources import exists

V2_5_FILE = "aesthetic_predictor_v2_5.pth"
V2_5_NOTICE = (
    "the code and weights of aesthetic predictor v2.5 (discus0434/aesthetic-predictor-v2-5) are under the AGPL-3.0: "
    "whoever passes on what is built on them, or offers it over a network, has to give the source under the same "
    "licence. If that is right for you, write aesthetic2.5(accept_license=True), or give --accept-license on the "
    "command line; the reward 'aesthetic' (Apache-2.0) measures much the same"
)


class LinearHead(nn.Module):
    """Linear layers without activations between them, under the names of the published file: `layers.0.weight`."""

    def __init__(self, part: str, layers: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.part = part
        self.add_module(part, nn.ModuleDict({number: nn.Linear(*sizes) for number, sizes in layers.items()}))

    def forward(self, embedding: Tensor) -> Tensor:
        for layer in self.get_submodule(self.part).children():
            embedding = layer(embedding)
        return embedding.squeeze(-1)


class Predictor(nn.Module):
    """Pixels as the trunk takes them -> one score per picture."""

    def __init__(self, towers: Any, head: LinearHead) -> None:
        super().__init__()
        # Only what sees is kept: the text tower would fill memory.
        self.vision_model = getattr(towers, "vision_model", towers)
        self.projection = getattr(towers, "visual_projection", nn.Identity())
        self.head = head

    def forward(self, pixels: Tensor) -> Tensor:
        dtype = next(self.head.parameters()).dtype
        embedding = self.projection(self.vision_model(pixel_values=pixels.to(dtype)).pooler_output)
        return self.head(unit(embedding, pixels.dtype).to(dtype)).to(pixels.dtype)


class Aesthetic(NetworkReward):
    """LAION's aesthetic predictor v2: about 1 to 10, the mark that people would give; most pictures get 4 to 7.

    Args:
        model: the head: a Hub id, folder or file with the weights `layers.{0,2,4,6,7}`. A pickle is read weights-only,
            once, and kept as safetensors in the cache.
        revision: branch, tag or commit of `model` on the Hub.
        trunk: a transformers CLIPModel with its preprocessor_config.json, by Hub id or folder.
        dtype: number format of the network.
        offload: keep the network in main memory between scores.

    Examples:
        >>> from alignprop_pipe.rewards import Aesthetic, parse_reward
        >>> parse_reward("aesthetic") == Aesthetic()  # 1.7 GB are downloaded when it scores for the first time
        True
    """

    name = "aesthetic"
    entry = RewardEntry(
        summary="how beautiful people would find the picture: LAION's aesthetic predictor v2 on CLIP-L/14",
        licence="head: Apache-2.0; CLIP: MIT",
        size_mb=1714,
        range_text="about 1 to 10, most pictures 4 to 7",
        weights=(
            ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
            ("openai/clip-vit-large-patch14", "model.safetensors"),
        ),
        memory_mb=1217,
    )
    sources = ("model", "trunk")
    reads_prompts = False
    families: tuple[str, ...] = ("clip",)
    part = "layers"
    files: tuple[str, ...] = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "model.safetensors")
    # The authors preprocess with torchvision.
    crop_rounds = True

    def __init__(
        self,
        model: str | Path = "trl-lib/ddpo-aesthetic-predictor",
        revision: str | None = None,
        trunk: str | Path = "openai/clip-vit-large-patch14",
        dtype: str = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(model, revision, dtype, offload)
        self.trunk = str(trunk)
        self.preprocess: Any = None

    def load(self) -> nn.Module:
        try:
            path = locate(self.model, self.files, self.revision)
            towers = load_towers(self.trunk, None, self.name, self.families)
            recipe = Preprocess.from_config(load_preprocessor_config(self.trunk))
        except RewardError as error:
            raise RewardError(f"{error}. {self._needs()}") from error
        head = linear_head(load_tensors(path), self.part, str(path))
        self.preprocess = dataclasses.replace(recipe, crop_rounds=self.crop_rounds)
        predictor = Predictor(towers, head)
        gives, takes = width(towers), next(head.parameters()).shape[1]
        if gives != takes:
            raise RewardError(
                f"the head {str(path)!r} takes embeddings of {takes} numbers; {self.trunk!r} gives {gives}: each head "
                "works with the model that it was trained on only"
            )
        return predictor

    def _needs(self) -> str:
        return (
            f"{self.name} needs two things: model, its head ({self.files[0]}), and trunk, the model that sees: `hf "
            f"download {self.trunk} config.json model.safetensors preprocessor_config.json --local-dir FOLDER`, and "
            "trunk=FOLDER"
        )

    def rate(self, network: Any, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        return network(self.preprocess(images))


class Aesthetic25(Aesthetic):
    """Aesthetic predictor v2.5 on SigLIP: 1 to 10, also for drawings; 5.5 and more is very good. AGPL-3.0.

    Args:
        model: the head: aesthetic_predictor_v2_5.pth or a folder that holds it. It is on no Hub page of its authors:
            it stands in the folder models of their repository on GitHub.
        revision: branch, tag or commit of `model`, where that is a Hub id.
        trunk: a transformers SiglipModel with its preprocessor_config.json, by Hub id or folder.
        accept_license: True says that you have read the licence and agree to it.
        dtype: number format of the network.
        offload: keep the network in main memory between scores.

    Raises RewardError with a notice unless the licence is accepted.

    Examples:
        >>> from alignprop_pipe.rewards import parse_reward
        >>> str(parse_reward("aesthetic2.5", accept_license=True))
        'aesthetic2.5(accept_license=True)'
    """

    name = "aesthetic2.5"
    entry = RewardEntry(
        summary="as aesthetic, also for drawings: aesthetic predictor v2.5 on SigLIP; model=FILE names its head",
        licence="head: AGPL-3.0, only with accept_license=True; SigLIP: Apache-2.0",
        size_mb=3516,
        range_text="1 to 10; 5.5 and more is very good",
        weights=(("google/siglip-so400m-patch14-384", "model.safetensors"),),
        memory_mb=1713,
        needs_acceptance="AGPL-3.0",
    )
    families = ("siglip", "siglip_vision_model")
    part = "scoring_head"
    files = (V2_5_FILE, "model.safetensors")
    crop_rounds = False

    def __init__(
        self,
        model: str | Path = V2_5_FILE,
        revision: str | None = None,
        trunk: str | Path = "google/siglip-so400m-patch14-384",
        accept_license: bool = False,
        dtype: str = "float32",
        offload: bool = False,
    ) -> None:
        if accept_license is not True:
            raise RewardError(V2_5_NOTICE)
        super().__init__(model, revision, trunk, dtype, offload)

    def check_sources(self) -> None:
        if self.model == V2_5_FILE and not exists(self.model):
            raise RewardError(
                f"{V2_5_FILE} is not in this folder, and it is not on the Hugging Face Hub. Get models/{V2_5_FILE} "
                "(2.6 MB) from the GitHub repository discus0434/aesthetic-predictor-v2-5, and give its path as model. "
                + self._needs()
            )
        super().check_sources()


def linear_head(tensors: Mapping[str, Tensor], part: str, source: str) -> LinearHead:
    """The head that the tensors `part.N.weight` and `part.N.bias` describe. Raises RewardError."""
    found = {int(m[1]): t for name, t in tensors.items() if (m := re.fullmatch(rf"{part}\.(\d+)\.weight", name))}
    weights = {str(number): found[number] for number in sorted(found)}
    if not weights or any(weight.ndim != 2 for weight in weights.values()):
        held = ", ".join(list(tensors)[:3])
        raise RewardError(f"{source!r} is no such head: {part}.0.weight and so on are needed; it holds {held}, ...")
    shapes = [tuple(weight.shape) for weight in weights.values()]
    if shapes[-1][0] != 1 or any(before[0] != after[1] for before, after in pairwise(shapes)):
        raise RewardError(f"the layers in {source!r} do not follow each other down to one number: {shapes}")
    head = LinearHead(part, {number: (weight.shape[1], weight.shape[0]) for number, weight in weights.items()})
    load_into(head, tensors, source)
    return head


def width(towers: Any) -> int:
    """How many numbers the picture embedding has."""
    if hasattr(towers, "visual_projection"):
        return towers.visual_projection.out_features
    return getattr(towers.config, "vision_config", towers.config).hidden_size
