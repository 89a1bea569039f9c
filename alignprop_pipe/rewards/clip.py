"""CLIPScore: how well a picture and its prompt agree (Hessel et al., arXiv 2104.08718), by any CLIP model.

Images [B, 3, H, W] in [0, 1] and prompts to the cosine of their embeddings, times `scale`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_pipe.bundled import bundled_path
from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images, Rewards, Targets
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.rewards.preprocess import Preprocess
from alignprop_pipe.rewards.pretrained import load_network, load_preprocessor_config, load_tokenizer, placed, usable

KEPT_PROMPTS = 4096


class ClipScore(Reward):
    """Cosine between picture and prompt, times `scale`: -scale to scale, real pictures 0.2 to 0.35 with CLIP-L.

    `model` is a transformers CLIPModel, by Hub id (with `revision`) or folder; "emoji" is the bundled scorer. It is
    loaded at the first score, on the images' device, and computes in float32 (float64 for float64 images).
    """

    name = "clip"

    def __init__(self, model: str | Path = "emoji", revision: str | None = None, scale: float | int = 1.0) -> None:
        self.model, self.revision, self.scale = str(model), revision, scale
        self._network: Any = None
        self._tokenizer: Any = None
        self._preprocess: Preprocess | None = None
        self._texts: dict[tuple[str, torch.dtype], Tensor] = {}

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        network, preprocess = self._loaded(images)
        pixels = preprocess(images)
        seen = _unit(network.get_image_features(pixel_values=pixels))
        said = torch.stack([self._text(network, prompt) for prompt in prompts]).to(seen)
        return self.scale * (seen * said).sum(dim=-1)

    def _loaded(self, images: Images) -> tuple[Any, Preprocess]:
        from transformers import AutoModel

        if self._network is None or self._preprocess is None or not usable(self._network):
            source = str(bundled_path("emoji-scorer")) if self.model == "emoji" else self.model
            self._preprocess = Preprocess.from_config(load_preprocessor_config(source, self.revision))
            self._tokenizer = load_tokenizer(source, self.revision)
            network = load_network(AutoModel, source, self.revision)
            if network.config.model_type != "clip":
                raise RewardError(f"{source!r} is a {type(network).__name__}; the reward 'clip' needs a CLIPModel")
            self._network = network
        return placed(self._network, images), self._preprocess

    def _text(self, network: Any, prompt: str) -> Tensor:
        """The embedding of one prompt. Each is computed alone, so that it does not depend on its neighbours."""
        key = (prompt, network.dtype)
        if key not in self._texts:
            limit = network.config.text_config.max_position_embeddings
            tokens = self._tokenizer([prompt], truncation=True, max_length=limit, return_tensors="pt")
            features = network.get_text_features(**tokens.to(network.device))
            if len(self._texts) >= KEPT_PROMPTS:
                del self._texts[next(iter(self._texts))]
            self._texts[key] = _unit(features)[0]
        return self._texts[key]


def _unit(features: Any) -> Tensor:
    # transformers 5 returns an object, 4 the tensor itself
    features = features if isinstance(features, Tensor) else features.pooler_output
    return features / features.norm(dim=-1, keepdim=True)
