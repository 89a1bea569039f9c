"""CLIPScore: how well a picture and its prompt agree (Hessel et al., arXiv 2104.08718), by any CLIP or SigLIP model.

Images [B, 3, H, W] in [0, 1] and prompts to the cosine of their embeddings, times a factor. Scorers that are a CLIP
with other weights (PickScore, HPSv2) share `TwoTowers`.
"""

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
from alignprop_pipe.rewards.networks.pretrained import load_network, load_preprocessor_config, load_tokenizer

KEPT_PROMPTS = 4096
NEEDED = {"clip": "a CLIPModel", "siglip": "a SiglipModel"}


class TwoTowers(NetworkReward):
    """A picture tower and a text tower: the cosine of what they say, times `factor`.

    `load` sets `tokenizer` and `preprocess`, and gives a transformers CLIPModel or SiglipModel. A prompt is embedded
    once and kept.
    """

    factor: float | int = 1.0
    tokenizer: Any = None
    preprocess: Preprocess = Preprocess(None, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(
        self, model: str | Path, revision: str | None = None, dtype: str = "float32", offload: bool = False
    ) -> None:
        super().__init__(model, revision, dtype, offload)
        self._texts: dict[tuple[str, torch.dtype], Tensor] = {}

    def rate(self, network: Any, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        pixels = self.preprocess(images).to(network.dtype)
        seen = unit(network.get_image_features(pixel_values=pixels), images.dtype)
        said = torch.stack([self._text(network, prompt, images.dtype) for prompt in prompts]).to(seen)
        return self.factor * (seen * said).sum(dim=-1)

    def read(self, config: Any, prompt: str) -> dict[str, Tensor]:
        """What the text tower takes for one prompt, cut where the tower ends."""
        limit = config.text_config.max_position_embeddings
        is_clip = config.model_type == "clip"
        # SigLIP learnt from lower-case texts padded to their full length (arXiv 2303.15343, 2502.14786); the tokenizer
        # that is published with SigLIP 2 keeps capitals. No mask hides the padding: the published ones give none.
        text = prompt if is_clip else prompt.lower()
        self.note_length(prompt, len(self.tokenizer(text, verbose=False).input_ids), limit)
        full = {} if is_clip else {"padding": "max_length"}
        return dict(self.tokenizer([text], truncation=True, max_length=limit, return_tensors="pt", **full))

    def _text(self, network: Any, prompt: str, dtype: torch.dtype) -> Tensor:
        """The embedding of one prompt. Each is computed alone, so that it does not depend on its neighbours."""
        key = (prompt, network.dtype)
        if key not in self._texts:
            tokens = self.read(network.config, prompt)
            features = network.get_text_features(**{name: ids.to(network.device) for name, ids in tokens.items()})
            if len(self._texts) >= KEPT_PROMPTS:
                del self._texts[next(iter(self._texts))]
            self._texts[key] = unit(features, dtype)[0].cpu()
        return self._texts[key]


class ClipScore(TwoTowers):
    """Cosine between picture and prompt, times `scale`: -scale to scale, real pictures 0.2 to 0.35 with CLIP-L.

    Args:
        model: a transformers CLIPModel or SiglipModel (SigLIP, and SigLIP 2 of fixed size), by Hub id or folder;
            "emoji" is the bundled scorer.
        revision: branch, tag or commit on the Hub.
        scale: what the cosine is multiplied with.
        dtype: number format of the network.
        offload: keep the network in main memory between scores.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import ClipScore
        >>> ClipScore("emoji")(torch.rand(1, 3, 64, 64), ["a fox"]).total.shape
        torch.Size([1])
    """

    name = "clip"
    entry = RewardEntry(
        summary="agreement of picture and prompt: by a CLIP or SigLIP model (the bundled one: emoji; else model=...)",
        licence="bundled weights: Apache-2.0",
        range_text="-1 to 1; CLIP-L on photographs: 0.2 to 0.35",
        bundled="emoji-scorer",
        memory_mb=2.2,
    )
    sources = ("model",)
    for_other_pictures = "openai/clip-vit-large-patch14"

    def __init__(
        self,
        model: str | Path = "emoji",
        revision: str | None = None,
        scale: float | int = 1.0,
        dtype: str = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(model, revision, dtype, offload)
        self.scale = self.factor = scale

    def load(self) -> nn.Module:
        source = str(bundled_path("emoji-scorer")) if self.model == "emoji" else self.model
        network = load_towers(source, self.revision, self.name, ("clip", "siglip"))
        self.preprocess = Preprocess.from_config(load_preprocessor_config(source, self.revision))
        self.tokenizer = load_tokenizer(source, self.revision)
        return network


def load_towers(source: str, revision: str | None, name: str, families: tuple[str, ...]) -> Any:
    """A CLIPModel or SiglipModel from a Hub id or folder. Raises RewardError for another kind of model."""
    from transformers import AutoModel

    network = load_network(AutoModel, source, revision)
    if network.config.model_type not in families:
        needed = " or ".join(NEEDED[family] for family in families if family in NEEDED)
        raise RewardError(f"{source!r} is a {type(network).__name__}; the reward {name!r} needs {needed}")
    return network


def unit(features: Any, dtype: torch.dtype) -> Tensor:
    """Embeddings [B, D] of length 1, computed in `dtype`."""
    # transformers 5 returns an object, 4 the tensor itself
    features = (features if isinstance(features, Tensor) else features.pooler_output).to(dtype)
    return features / features.norm(dim=-1, keepdim=True)
