"""PickScore: which of two pictures people would pick (Kirstain et al., arXiv 2305.01569): a CLIP ViT-H/14.

Images [B, 3, H, W] in [0, 1] and prompts to the cosine of their embeddings, times the model's logit scale.
"""

from pathlib import Path

from torch import nn

from alignprop_pipe.rewards.entries import RewardEntry
from alignprop_pipe.rewards.networks.clip import TwoTowers, load_towers
from alignprop_pipe.rewards.networks.preprocess import Preprocess
from alignprop_pipe.rewards.networks.pretrained import load_preprocessor_config, load_tokenizer


class PickScore(TwoTowers):
    """About 17 to 24 for pictures of today's models; a difference of 1 means that 73 % would pick the higher one.

    Args:
        model: a transformers CLIPModel with its tokenizer and preprocessor_config.json, by Hub id or folder.
        revision: branch, tag or commit on the Hub.
        dtype: number format of the network. The logit scale is applied in float32 always.
        offload: keep the network in main memory between scores.

    Examples:
        >>> from alignprop_pipe.rewards import PickScore, parse_reward
        >>> parse_reward("pickscore") == PickScore()  # 3.9 GB are downloaded when it scores for the first time
        True
    """

    name = "pickscore"
    entry = RewardEntry(
        summary="which picture people would pick for a prompt: PickScore, a CLIP ViT-H/14",
        licence="MIT",
        size_mb=3948,
        range_text="about 17 to 24; 1 more is picked 73 times in 100",
        weights=(("yuvalkirstain/PickScore_v1", "model.safetensors"),),
        memory_mb=3944,
    )
    sources = ("model",)

    def __init__(
        self,
        model: str | Path = "yuvalkirstain/PickScore_v1",
        revision: str | None = None,
        dtype: str = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(model, revision, dtype, offload)

    def load(self) -> nn.Module:
        network = load_towers(self.model, self.revision, self.name, ("clip",))
        self.factor = float(network.logit_scale.double().exp())
        self.preprocess = Preprocess.from_config(load_preprocessor_config(self.model, self.revision))
        self.tokenizer = load_tokenizer(self.model, self.revision)
        return network
