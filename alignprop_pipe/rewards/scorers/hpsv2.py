"""HPSv2 and HPSv2.1: which picture people prefer for a prompt (Wu et al., arXiv 2306.09341): a CLIP ViT-H/14.

Images [B, 3, H, W] in [0, 1] and prompts to the cosine of their embeddings, without a logit scale.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards.entries import RewardEntry
from alignprop_pipe.rewards.networks.clip import TwoTowers
from alignprop_pipe.rewards.networks.open_clip import clip_names, token_ids
from alignprop_pipe.rewards.networks.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from alignprop_pipe.rewards.networks.pretrained import load_config, load_tokenizer
from alignprop_pipe.rewards.networks.weights import check_fit, load_tensors, locate
from alignprop_pipe.sources import exists, expanded, is_file, is_folder

_PROCESSOR_FILES = "config.json tokenizer_config.json tokenizer.json special_tokens_map.json vocab.json merges.txt"
_OTHER_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


class HpsV2(TwoTowers):
    """Cosine, 0.2 to 0.35 for real pictures. The numbers of v2 and v2.1 cannot be compared with each other.

    Args:
        model: Hub id, folder or file of the weights: named as open_clip does (HPS_v2_compressed.pt) or as CLIPModel
            does (model.safetensors, pytorch_model.bin).
        revision: branch, tag or commit of `model` on the Hub.
        processor: Hub id or folder of the network's config.json and of the tokenizer, where the folder of `model` does
            not hold them.
        dtype: number format of the network.
        offload: keep the network in main memory between scores.

    Examples:
        >>> from alignprop_pipe.rewards import HpsV2, parse_reward
        >>> parse_reward("hpsv2") == HpsV2()  # 2.0 GB are downloaded when it scores for the first time
        True
    """

    name = "hpsv2"
    entry = RewardEntry(
        summary="HPSv2 before version 2.1, for comparing with published numbers; the two are on different scales",
        licence="Apache-2.0",
        size_mb=1976,
        range_text="cosine; 0.2 to 0.35",
        weights=(("xswu/HPSv2", "HPS_v2_compressed.pt"), ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "tokenizer.json")),
        memory_mb=3944,
    )
    sources = ("model", "processor")
    file = "HPS_v2_compressed.pt"

    def __init__(
        self,
        model: str | Path = "xswu/HPSv2",
        revision: str | None = None,
        processor: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: str = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(model, revision, dtype, offload)
        self.processor = str(processor)

    def load(self) -> nn.Module:
        from transformers import CLIPModel

        try:
            path = locate(self.model, (self.file, *_OTHER_FILES), self.revision)
        except RewardError as error:
            raise RewardError(f"{error}. {self._also_needs()}") from error
        try:
            config = clip_config(self._home("config.json"))
            self.tokenizer = load_tokenizer(self._home("tokenizer_config.json"))
        except RewardError as error:
            raise RewardError(f"{self._also_needs()}. {error}") from error
        tensors = clip_names(load_tensors(path))
        with torch.device("meta"):
            check_fit(CLIPModel(config), tensors, str(path))
        # transformers builds it without first drawing a billion random numbers
        network = CLIPModel.from_pretrained(None, config=config, state_dict=tensors)
        # The authors' code resizes tensors, not PIL images: the longer side, without rounding to 8 bits.
        side = config.vision_config.image_size
        self.preprocess = Preprocess(side, None, CLIP_MEAN, CLIP_STD, letterbox=True)
        return network

    def read(self, config: Any, prompt: str) -> dict[str, Tensor]:
        limit = config.text_config.max_position_embeddings
        ids = token_ids(self.tokenizer, prompt)
        self.note_length(prompt, len(ids), limit)
        ids = ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
        return {"input_ids": torch.tensor([ids])}

    def _also_needs(self) -> str:
        return (
            f"Next to its weights {self.name} needs config.json and the tokenizer of a CLIP ViT-H/14: on a machine "
            f"with a network, run `hf download {self.processor} {_PROCESSOR_FILES} --local-dir FOLDER`; bring these "
            "files here, into the folder of the weights or another, and give that one as processor"
        )

    def _home(self, file: str) -> str:
        """The folder of the weights where it holds `file`, else `processor`."""
        path = expanded(self.model)
        folder = path if is_folder(path) else path.parent
        return str(folder) if exists(path) and is_file(folder / file) else self.processor


class HpsV21(HpsV2):
    """As `HpsV2`, trained on better data: use this one unless you compare with published numbers of v2.

    Examples:
        >>> from alignprop_pipe.rewards import HpsV21, parse_reward
        >>> parse_reward("hpsv2.1") == HpsV21()
        True
    """

    name = "hpsv2.1"
    entry = RewardEntry(
        summary="which picture people prefer for a prompt: HPSv2.1, a CLIP ViT-H/14",
        licence="Apache-2.0",
        size_mb=1976,
        range_text="cosine; 0.2 to 0.35",
        weights=(("xswu/HPSv2", "HPS_v2.1_compressed.pt"), ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "tokenizer.json")),
        memory_mb=3944,
    )
    file = "HPS_v2.1_compressed.pt"


def clip_config(source: str) -> Any:
    """The sizes of a CLIPModel, from config.json. Raises RewardError."""
    config = load_config(source)
    if config.model_type != "clip":
        raise RewardError(f"config.json of {source!r} describes a {config.model_type!r} model; a CLIPModel is needed")
    return config
