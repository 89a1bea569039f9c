"""Where a model comes from: what a name or path means, and what its index may load."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline, pipelines
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from alignprop_pipe.bundled import resolve_model
from alignprop_pipe.errors import PipelineError
from alignprop_pipe.sources import exists, hub_hint, on_hub

logger = logging.getLogger(__name__)


MODEL_NEEDED = (
    "name 'emoji' (bundled), a model on the Hub like stable-diffusion-v1-5/stable-diffusion-v1-5, a folder that holds "
    "a model_index.json, or a .safetensors file"
)


def model_source(given: str | os.PathLike) -> tuple[str, dict[str, Any]]:
    """The folder or the name on the Hub; that it is there, and the revision in it. Raises PipelineError, HubError."""
    name, there = os.fspath(given), on_hub(given)
    if there is not None:
        return there.repo_id, {"hub": True, **({"revision": there.revision} if there.revision else {})}
    if resolve_model(name) == name and not exists(name):
        raise PipelineError(f"there is no file or folder {name!r} here{hub_hint(name)}; {MODEL_NEEDED}")
    return name, {}


def refuse_foreign_modules(folder: str, kwargs: Mapping[str, Any]) -> None:
    """A model's index names the module of each part, and diffusers before 0.42.1 imports whichever it is.

    Modules that the program has imported itself are its own. Raises PipelineError.
    """
    where = ("revision", "cache_dir", "token", "local_files_only", "proxies", "force_download")
    try:
        index: Any = DiffusionPipeline.load_config(folder, **{name: kwargs[name] for name in where if name in kwargs})
    except (OSError, ValueError):  # there is none, as from_pretrained will say
        return
    for part, named in index.items() if isinstance(index, dict) else ():
        if part.startswith("_") or not (isinstance(named, list | tuple) and named and isinstance(named[0], str)):
            continue
        module = named[0]
        is_known = module in LOADABLE_CLASSES or module in sys.modules or hasattr(pipelines, module)
        if not is_known and not kwargs.get("trust_remote_code"):
            raise PipelineError(
                f"{folder!r} names the module {module!r} for its part {part!r}, which is no part of diffusers and is "
                "not imported. If you trust it, import it before, or give trust_remote_code=True where it lies in the "
                "model's folder"
            )


@contextmanager
def known_types() -> Iterator[None]:
    """No warning that a bundled model's decoder is not of the class in the type hint: it is meant to be another."""
    library = logging.getLogger("diffusers.pipelines.pipeline_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "Expected types" not in record.getMessage()

    library.addFilter(keep)
    try:
        yield
    finally:
        library.removeFilter(keep)
