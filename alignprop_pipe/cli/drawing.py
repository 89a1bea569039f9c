"""Files of a command: names that are free, and pictures with text chunks that say how they were made."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import alignprop_pipe
from alignprop_pipe.cli.console import Output
from alignprop_pipe.cli.options import SampleRequest
from alignprop_pipe.config.settings import SamplingOptions
from alignprop_pipe.errors import RunError
from alignprop_pipe.files import PROMPT_CHUNK, SHEET_CHUNK, write_whole
from alignprop_pipe.sources import exists, on_hub

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from PIL import Image

    from alignprop_pipe.diffusion.sample import Picture


@dataclass(frozen=True, slots=True)
class Sheet:
    """One call of `sample`: what was asked for, and the number of the first file."""

    request: SampleRequest
    model: str
    sampling: SamplingOptions
    adapter: Path | None
    first: int

    @classmethod
    def begin(cls, request: SampleRequest, model: str, sampling: SamplingOptions, adapter: Path | None) -> "Sheet":
        """Make the folder; numbers go on behind those that are in it. Raises RunError."""
        try:
            request.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{str(request.out)!r} cannot be a folder for pictures: {error.strerror}") from error
        numbers = [path.name.partition("-")[0] for path in request.out.glob("*.png")]
        return cls(request, model, sampling, adapter, max((int(n) for n in numbers if n.isdecimal()), default=0) + 1)

    @property
    def scale(self) -> float:
        return 1.0 if self.request.scale is None else self.request.scale

    def about(self, picture: "Picture") -> dict[str, str | int | float]:
        """What the text chunks say; folders and files by their last name, so that no path goes along."""
        facts = {
            PROMPT_CHUNK: picture.prompt,
            SHEET_CHUNK: "base and aligned" if self.request.compare else "",
            "negative_prompt": self.sampling.negative_prompt,
            "seed": self.request.seed,
            "number": picture.number,
            "model": Path(self.model).name if exists(self.model) else self.model,
            "adapter": "" if self.adapter is None else _public(self.adapter),
            "scale": "" if self.adapter is None else self.scale,
            "window": self.request.window or "",
            "num_inference_steps": self.sampling.num_inference_steps,
            "guidance_scale": self.sampling.guidance_scale,
            "software": f"alignprop-pipe {alignprop_pipe.__version__}",
        }
        return {name: text for name, text in facts.items() if text != ""}


def check_out(out: Path) -> None:
    """Raises RunError where no pictures can be written, and leaves nothing behind."""
    missing = [folder for folder in (out, *out.parents) if not exists(folder)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except (OSError, ValueError) as error:
        raise RunError(f"{str(out)!r} cannot be a folder for pictures: {error}; name another with --out") from error
    finally:
        for folder in missing:
            with contextlib.suppress(OSError, ValueError):  # it was never made, or somebody has put something there
                folder.rmdir()


def draw(pipe: "DiffusionPipeline", prompts: Sequence[str], sheet: Sheet, output: Output) -> list[Path]:
    """Draw and write every picture, then the grid, whose path comes last. Raises RunError."""
    from alignprop_pipe.images import enlarged, make_grid, png_bytes
    from alignprop_pipe.runs.folder import slug

    files, shown = [], []
    for place, (picture, frames) in enumerate(_drawn(pipe, prompts, sheet)):
        path = sheet.request.out / f"{sheet.first + place:03d}-{slug(picture.prompt, 'prompt')}.png"
        about = sheet.about(picture)
        chunks = {name: f"{fact:g}" if isinstance(fact, float) else str(fact) for name, fact in about.items()}
        write_whole(path, png_bytes(frames, chunks))
        output.record("picture", {"file": path, **about})
        files.append(path)
        shown.append(frames[len(frames) // 2])
    grid = _free(sheet.request.out / "grid.png")
    write_whole(grid, png_bytes([make_grid([enlarged(image) for image in shown])], {SHEET_CHUNK: "grid"}))
    return [*files, grid]


def _drawn(
    pipe: "DiffusionPipeline", prompts: Sequence[str], sheet: Sheet
) -> Iterator[tuple["Picture", Sequence["Image.Image"]]]:
    """Pictures and their frames; to compare, the base is drawn before the adapter goes on."""
    from alignprop_pipe.adapters.apply import load_adapter
    from alignprop_pipe.diffusion.sample import sample_pictures
    from alignprop_pipe.images import side_by_side

    asked = sheet.request
    how = {"seed": asked.seed, "num": asked.num, "batch_size": asked.batch_size}
    base = list(sample_pictures(pipe, prompts, sheet.sampling, **how)) if asked.compare else []
    if sheet.adapter is not None:
        load_adapter(pipe, sheet.adapter, scale=sheet.scale, window=asked.window)
    for place, picture in enumerate(sample_pictures(pipe, prompts, sheet.sampling, **how)):
        frames = picture.frames
        if base:
            pairs = zip(base[place].frames, frames, strict=True)
            frames = [side_by_side(pair, ("base", f"aligned, scale {sheet.scale:g}")) for pair in pairs]
        yield picture, frames


def default_out(reward: str) -> Path:
    """`runs/<date>-<time>-<reward>`, under a name that is free."""
    from alignprop_pipe.runs.folder import slug

    return _free(Path("runs", f"{datetime.now():%Y-%m-%d-%H%M}-{slug(reward, 'run')}"))


def _public(adapter: Path) -> str:
    """The name of a file; of one on the Hub, all of its name there."""
    there = on_hub(adapter)
    return adapter.name if there is None else there.repo_id


def _free(path: Path) -> Path:
    """The path, or with -2, -3 and so on behind its stem where that is taken."""
    number, free = 2, path
    while free.exists():
        number, free = number + 1, path.with_stem(f"{path.stem}-{number}")
    return free
