"""What a scorer does to images before its network sees them, differentiably, and as PIL would have done it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images

Resized = Float[Tensor, "batch 3 new_height new_width"]

_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Resize, centre crop, normalise: the recipe in a model's preprocessor_config.json.

    `size` is the shorter side, or (height, width); `crop` is (height, width). None leaves that step out.
    `crop_rounds`: half a pixel next to the crop is rounded to even, as torchvision does; transformers rounds down.
    `letterbox`: `size` is the longer side, black is added to a square of it, and pictures are resized as tensors, in
    one pass and past 0 and 1 at hard edges.
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: str = "bicubic"
    crop_rounds: bool = False
    letterbox: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Preprocess":
        """Read the dictionary of a transformers image processor. Raises RewardError for what it can't do."""
        try:
            crop = _sides(config["crop_size"]) if config.get("do_center_crop", "crop_size" in config) else None
            normal = config.get("do_normalize", True)
            recipe = cls(
                size=_size(config["size"]) if config.get("do_resize", True) else None,
                crop=crop,
                mean=tuple(float(v) for v in config["image_mean"]) if normal else (0.0, 0.0, 0.0),
                std=tuple(float(v) for v in config["image_std"]) if normal else (1.0, 1.0, 1.0),
                resample=_FILTERS[int(config.get("resample", 3))],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RewardError(
                f"preprocessor_config.json cannot be used ({type(error).__name__}: {error}): size, image_mean and "
                "image_std are needed, and a bicubic (3) or bilinear (2) resample"
            ) from error
        factor = config.get("rescale_factor", 1 / 255)
        if abs(float(factor) * 255 - 1) > 1e-3:
            raise RewardError(f"preprocessor_config.json has rescale_factor {factor}: 1/255 is needed")
        return recipe

    def __call__(self, images: Images) -> Resized:
        """`images` in [0, 1], any height and width, to what the network takes; float64 stays, all else is float32."""
        images = images.to(torch.float64 if images.dtype == torch.float64 else torch.float32)
        if self.letterbox and isinstance(self.size, int):
            images = letterbox(images, self.size, self.resample)
        else:
            images = resize(images, target_size(images, self.size), self.resample)
        if self.crop is not None:
            images = center_crop(images, self.crop, self.crop_rounds)
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def target_size(images: Tensor, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width after resizing the shorter side to `size`, rounded as transformers does."""
    height, width = images.shape[-2:]
    if not isinstance(size, int):
        return size or (height, width)
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def resize(images: Images, size: tuple[int, int], resample: str = "bicubic") -> Resized:
    """Antialiased resize, within 2/255 of PIL's: two passes, each clamped to [0, 1] as 8-bit pictures are."""
    (height, width), (new_height, new_width) = images.shape[-2:], size
    # Pillow 13 starts with the height where that shrinks much more; older ones always start with the width.
    height_first = height - new_height > max(0, 2 * (width - new_width))
    for shape in ((new_height, width) if height_first else (height, new_width), size):
        if tuple(images.shape[-2:]) != shape:
            images = F.interpolate(images, size=shape, mode=resample, antialias=True, align_corners=False).clamp(0, 1)
    return images


def letterbox(images: Images, side: int, resample: str = "bicubic") -> Resized:
    """The longer side resized to `side`, then black on both sides of the shorter one, the odd pixel right or below."""
    scale = side / max(images.shape[-2:])
    height, width = (max(1, round(length * scale)) for length in images.shape[-2:])
    if tuple(images.shape[-2:]) != (height, width):
        images = F.interpolate(images, size=(height, width), mode=resample, antialias=True, align_corners=False)
    down, across = side - height, side - width
    return F.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))


def center_crop(images: Images, size: tuple[int, int], rounds: bool = False) -> Resized:
    """The middle `size` of the images; black is added where they are smaller. `rounds`: as `Preprocess.crop_rounds`."""
    (height, width), (wanted_height, wanted_width) = images.shape[-2:], size
    down, across = max(wanted_height - height, 0), max(wanted_width - width, 0)
    if down or across:
        # The larger half stands above and to the left, as in transformers.
        above, left = (down + 1) // 2, (across + 1) // 2
        images = F.pad(images, (left, across - left, above, down - above))
        height, width = images.shape[-2:]
    beside = (height - wanted_height, width - wanted_width)
    top, left = (round(pixels / 2) if rounds else pixels // 2 for pixels in beside)
    return images[..., top : top + wanted_height, left : left + wanted_width]


def _sides(value: Any) -> tuple[int, int]:
    return (int(value["height"]), int(value["width"])) if isinstance(value, Mapping) else (int(value), int(value))


def _size(value: Any) -> int | tuple[int, int]:
    if isinstance(value, Mapping):
        return int(value["shortest_edge"]) if "shortest_edge" in value else _sides(value)
    return int(value)
