"""`AlignPropPipeline`: a stock diffusers pipeline that can also be aligned to a reward.

The class is made on the fly as a subclass of the stock class, so everything that takes the stock
pipeline takes this one, and pictures, files and arguments stay the stock ones.
"""

import copyreg
import difflib
import inspect
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import Tensor

from alignprop_pipe.adapters import apply
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.bundled import resolve_model
from alignprop_pipe.config.choices import Window
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.diffusion import lora, pipeline_parts
from alignprop_pipe.diffusion import window as windows
from alignprop_pipe.diffusion.loading import known_types, model_source, refuse_foreign_modules
from alignprop_pipe.diffusion.rollout import autograd_on
from alignprop_pipe.diffusion.single_file import load_single_file
from alignprop_pipe.errors import AdapterError, PipelineError
from alignprop_pipe.records import StepRecord
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.training.align import align
from alignprop_pipe.training.progress import Display
from alignprop_pipe.training.result import AlignResult

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from diffusers.loaders.lora_base import LoraBaseMixin
    from PIL import Image

    class Drawn:
        """What a call returns: pictures, or the frames of each video. As PIL has them, unless `output_type` says so."""

        images: list[Image.Image]
        frames: list[list[Image.Image]]

    class Stock(LoraBaseMixin, DiffusionPipeline):
        """What a type checker and an editor know of the stock class that is found when the model is loaded."""

        unet: Any
        transformer: Any
        vae: Any
        scheduler: Any
        tokenizer: Any
        text_encoder: Any

        def __call__(self, *args: Any, **kwargs: Any) -> Drawn: ...

        def load_lora_weights(  # pyright: ignore[reportIncompatibleMethodOverride]  # the mixin's takes no file
            self,
            pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor],
            adapter_name: str | None = None,
            **kwargs: Any,
        ) -> None: ...
else:
    Stock = DiffusionPipeline


class AlignPropPipeline(Stock):
    """Mixin that gives `align`, `save_adapter` and `load_adapter` to a stock pipeline class.

    Make one with `from_pretrained`, `from_pipe` or `from_single_file`; it is an instance of the stock class too.

    Examples:
        >>> from alignprop_pipe import AlignPropPipeline
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> options = {"steps": 1, "batch_size": 1, "num_inference_steps": 2, "eval_prompts": 2}
        >>> result = pipe.align("clip", "emoji", progress=False, **options)
        >>> pipe("two cats on a blue background", num_inference_steps=2).images[0].size
        (64, 64)
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "AlignPropPipeline":
        """Load any text-to-image or text-to-video pipeline of diffusers: `emoji`, a folder, or `me/name` on the Hub.

        `hf://me/name` and `hf://me/name@revision` are on the Hub whatever folders are here. `kwargs` are those of
        `DiffusionPipeline.from_pretrained` (`dtype`, `revision`, `variant`, ...). Raises PipelineError where there is
        no such folder and the name may have been meant as one, or where the model names a module that is no part of
        diffusers, and HubError for an hf:// that is no name.
        """
        name, there = model_source(pretrained_model_name_or_path)
        folder = resolve_model(name)
        if there.get("revision"):
            kwargs = {"revision": there["revision"], **kwargs}
        refuse_foreign_modules(folder, kwargs)
        with autograd_on(), known_types() if folder != name else nullcontext():
            pipe = DiffusionPipeline.from_pretrained(folder, **kwargs)
        pipe.register_to_config(_name_or_path=name)
        asked = {key: kwargs[key] for key in ("revision", "variant") if isinstance(kwargs.get(key), str)}
        pipe._alignprop_source = {**there, **asked}
        return cls.from_pipe(pipe)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "AlignPropPipeline":
        """The same pipeline as an AlignPropPipeline; the networks are shared, not copied.

        So after `align` the first pipeline draws with the adapter too, as every pipeline does that shares them.

        Args:
            pipeline: any pipeline of diffusers.
            kwargs: as in `DiffusionPipeline.from_pipe`: other components and options of the class, and `dtype`
                (`torch_dtype`) to cast the networks, which `pipeline` shares, to. By default they keep theirs.

        Raises:
            PipelineError: no pipeline, or a name that its class does not know.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise PipelineError(
                f"from_pipe needs a diffusers pipeline, not {type(pipeline).__name__}; for a model id or a folder "
                "use AlignPropPipeline.from_pretrained(...)"
            )
        dtypes = [kwargs.pop(name, None) for name in ("torch_dtype", "dtype")]
        dtype = dtypes[1] or dtypes[0]
        if not isinstance(dtype, torch.dtype | None):
            raise PipelineError(f"dtype={dtype!r}: a number format of torch is needed, such as torch.float16")
        kind = stock_class(type(pipeline))
        if kwargs:
            pipe = _made_anew(kind, pipeline, kwargs)
        else:
            pipe = _bare(kind)
            pipe.__dict__.update(vars(pipeline))
        return cast(AlignPropPipeline, pipe if dtype is None else pipe.to(dtype=dtype))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For `pickle` and `copy`: the class is made on the fly, so what is written is the stock one."""
        return _bare, (stock_class(type(self)),), *cast(tuple, super().__reduce_ex__(protocol))[2:]

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, pipeline_class: type | None = None, **kwargs: Any
    ) -> "AlignPropPipeline":
        """Load a single checkpoint file; Stable Diffusion 1.x, 2.x and XL with no call to the Hub.

        They need a folder with the CLIP tokenizer's vocab.json and merges.txt as `tokenizer_folder=` or `tokenizer=`,
        or the tokenizer in the Hub's cache. For other models diffusers asks the Hub for the configuration: give
        `config=` (a diffusers folder or Hub id) where it cannot tell the model by its weights, or `pipeline_class=` to
        choose. Other `kwargs` are those of the stock `from_single_file`. Raises PipelineError.
        """
        path = str(pretrained_model_link_or_path)
        with autograd_on():
            pipe = load_single_file(path, pipeline_class, **kwargs)
        pipe.register_to_config(_name_or_path=path)
        return cls.from_pipe(pipe)

    def align(
        self,
        reward: Reward | str | Callable[..., Tensor],
        prompts: Any,
        config: AlignConfig | Mapping[str, Any] | None = None,
        *,
        out: str | Path | None = None,
        on_step: Callable[[StepRecord], object] | None = None,
        progress: bool | Literal["previews"] | Display = True,
        stop: threading.Event | None = None,
        **overrides: Any,
    ) -> AlignResult:
        """Train a LoRA on the denoiser so that `reward` of the finished pictures goes up (AlignProp, 2310.03739).

        Arguments, errors and what comes back are those of `alignprop_pipe.training.align.align`, which takes any
        pipeline first:

        Args:
            reward: a reward, an expression (`"hpsv2.1 + 0.1*jpeg"`), or a function `(images, prompts) -> [batch]`.
            prompts: a list, a .txt, .csv, .tsv or .jsonl file, the name of a set that ships inside, or a PromptSet.
            config: all settings, or a table of some of them, over the model's own preset.
            out: folder for adapter, curve, pictures and report; None writes nothing.
            on_step: called with every record.
            progress: a line with reward, held-out score, memory and the time that is left; False: silence;
                "previews": the newest pictures in a notebook too.
            stop: ends the run after the current step once it is set.
            overrides: single settings by name, or arguments of this pipeline's own call.
        """
        return align(
            self, reward, prompts, config, out=out, on_step=on_step, progress=progress, stop=stop, **overrides,
        )  # fmt: skip

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write the base model in diffusers' folder format, and the adapter, if there is one, as a file in it.

        Stock diffusers opens the folder; `load_lora_weights(save_directory)` there puts the adapter on. What
        `fuse_lora` has put into the weights is in them there too, our adapter as well, which then gets no file. Other
        LoRAs stay out, which is told. Raises AdapterError for an adapter that is fused in some components alone, or in
        spite of its window.
        """
        beside, fused = lora.unfused_and_fused(pipeline_parts.components(self))
        if lora.ADAPTER_NAME in beside & fused:
            raise AdapterError(
                "the adapter is fused in some components and in others not: call pipe.unfuse_lora() first, or "
                "pipe.fuse_lora() to fuse all of it"
            )
        if lora.ADAPTER_NAME in fused and (window := windows.held_by(apply.networks(self).values())) is not None:
            raise AdapterError(
                f"the adapter works in the window {window} of the steps, which weights cannot say, and is fused: call "
                "pipe.unfuse_lora() first"
            )
        if lora.ADAPTER_NAME in beside:
            apply.save_adapter(self, Path(save_directory) / LORA_WEIGHT_NAME_SAFE, format="diffusers")
        if left_out := sorted(beside - {lora.ADAPTER_NAME}):
            logger.warning(
                "LoRA %s is not in the folder, which holds the base model%s; pipe.fuse_lora() before puts it into the "
                "weights",
                " and ".join(map(repr, left_out)),
                " and our adapter" if lora.ADAPTER_NAME in beside else "",
            )
        with lora.taken_out(pipeline_parts.components(self).values()):
            super().save_pretrained(save_directory, *args, **kwargs)

    def save_adapter(self, path: str | Path, format: str = "both", **metadata: str) -> list[Path]:
        """Write the adapter as safetensors: `diffusers`, `comfyui` or `kohya` keys, or the first two side by side.

        Returns the files written. Raises AdapterError if the pipeline holds no adapter.
        """
        return apply.save_adapter(self, path, format=format, metadata=metadata)  # type: ignore[arg-type]

    def load_adapter(
        self,
        source: str | Path | Adapter,
        scale: float = 1.0,
        window: Window | str | Sequence[Any] | None = None,
        revision: str | None = None,
    ) -> None:
        """Put an adapter on the pipeline, in place of one that it holds: a file, run folder, `Adapter` or "me/name".

        The last is a name on the Hub, there at `revision`; the cache serves where the Hub cannot be reached.
        `scale` is its strength: 1.0 as trained. `window` keeps it to a share of the denoising steps: (0.0, 0.6) or
        "0.0-0.6" are the first 60 % (default: what the file says, else all). Raises AdapterError, ConfigError.
        """
        apply.load_adapter(self, source, scale, window, revision)


# --- classes ---


def stock_class(kind: type) -> type:
    """The stock pipeline class behind `kind`, which may be an aligned one."""
    return next(base for base in kind.__mro__ if not issubclass(base, AlignPropPipeline))


class _Made(type):
    """The type of classes that no module holds: a pickle names the stock class instead."""


copyreg.pickle(_Made, lambda kind: (aligned_class, (stock_class(kind),)))  # type: ignore[arg-type]


@cache
def aligned_class(kind: type) -> type:
    """The subclass of AlignPropPipeline and `kind`.

    It keeps the stock `__name__`, which diffusers writes into model_index.json and looks up when it converts between
    tasks, so what is saved opens without this package; `__qualname__` tells the two apart.
    """
    body = {"__qualname__": f"AlignProp{kind.__name__}", "__module__": __name__, "__doc__": kind.__doc__}
    return _Made(kind.__name__, (AlignPropPipeline, kind), body)


def _bare(kind: type) -> AlignPropPipeline:
    """An object of the aligned class with nothing in it."""
    return object.__new__(aligned_class(kind))


def _made_anew(kind: type, pipeline: DiffusionPipeline, changed: Mapping[str, Any]) -> AlignPropPipeline:
    """Through `__init__`, which works out what depends on the parts; what else was set on `pipeline` stays."""
    takes = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    for name in changed:
        if name not in takes:
            near = difflib.get_close_matches(name, takes, 1) or takes
            raise PipelineError(f"{kind.__name__} takes no {name!r}; did you mean {' or '.join(map(repr, near))}?")
        if name in pipeline.components and isinstance(changed[name], str | bytes | int | float | Path | Mapping | list):
            held = type(pipeline.components[name]).__name__
            raise PipelineError(f"{name}={changed[name]!r}: a loaded component is needed, or None; now it is a {held}")
    known = {**pipeline.config, **pipeline.components}
    pipe = aligned_class(kind)(**{**{name: known[name] for name in takes if name in known}, **changed})
    vars(pipe).update({name: value for name, value in vars(pipeline).items() if name not in vars(pipe)})
    pipe.register_to_config(**{name: value for name, value in pipeline.config.items() if name not in pipe.config})
    return pipe
