"""The models that ship inside: a text-to-image model, a scorer, a detector and an answerer as rewards, and the judge.

No torch here, so that `alignprop models` answers at once. The weights come from examples/bundled_model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignprop_pipe.errors import AlignError
from alignprop_pipe.sources import is_folder

MODELS_DIR = Path(__file__).parent / "models"

BundledName = Literal["emoji", "emoji-scorer", "emoji-detector", "emoji-answerer", "emoji-judge"]


@dataclass(frozen=True, slots=True)
class BundledModel:
    """One folder of weights; `preset` names the `AlignConfig.preset` that is made for it."""

    name: BundledName
    summary: str
    preset: str | None = None
    licence: str = "Apache-2.0; trained on pictures of Noto Color Emoji (OFL 1.1)"

    @property
    def path(self) -> Path:
        return MODELS_DIR / self.name

    @property
    def size_mb(self) -> float:
        """Size on disk in 10^6 bytes; 0 where the folder is missing."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()) / 1e6

    @property
    def missing(self) -> str | None:
        """The first file that the model needs and lacks, or None for a complete one."""
        return _missing_file(self.path)


MODELS: tuple[BundledModel, ...] = (
    BundledModel(
        "emoji", "text-to-image, 64x64: one to four emoji of a kind on a plain background; the default", "emoji"
    ),
    BundledModel("emoji-scorer", "CLIP for these pictures; the default reward"),
    BundledModel("emoji-detector", "OWLv2 for these pictures: the rewards count, contains and without"),
    BundledModel("emoji-answerer", 'BLIP for yes and no about these pictures: the reward ask with model="emoji"'),
    BundledModel("emoji-judge", "reads subject, count and background from a picture; watched, never trained on"),
)


REWARD = "smooth(clip)"
"""What the bundled text-to-image model is aligned to where nothing else is asked for."""


def preset_for(model: str | None) -> str:
    """The preset that a run starts from: a bundled model's own, `fast` for every other model."""
    return next((entry.preset for entry in MODELS if entry.name == model and entry.preset), "fast")


def is_bundled(id_or_path: str | None) -> bool:
    """Whether the text-to-image model of this name or folder is the one that ships inside."""
    folder = (MODELS_DIR / "emoji").resolve()
    return id_or_path == "emoji" or (is_folder(id_or_path or "") and Path(str(id_or_path)).resolve() == folder)


def resolve_model(id_or_path: str) -> str:
    """The folder of the bundled model for the id "emoji"; every other id or path as it came. Raises AlignError."""
    return str(bundled_path("emoji")) if id_or_path == "emoji" else id_or_path


def bundled_path(name: BundledName) -> Path:
    """The folder of a bundled model. Raises AlignError if a file of it is missing."""
    model = next(model for model in MODELS if model.name == name)
    if model.missing is not None:
        raise AlignError(
            f"the bundled model {name!r} is incomplete: {model.missing} is not in {model.path}. Install the package "
            "again with 'pip install --force-reinstall --no-deps alignprop-pipe', or in a clone of the repository "
            "bring the file back with 'git checkout -- alignprop_pipe/models'"
        )
    return model.path


def _missing_file(folder: Path) -> str | None:
    """A pipeline lists its parts in model_index.json; a single network is a config.json with its weights."""
    index = folder / "model_index.json"
    if not index.is_file():
        return _missing_in_network(folder, folder) if (folder / "config.json").is_file() else "its configuration"
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
    except ValueError:
        return "a readable model_index.json"
    for part, classes in listed.items():
        if not isinstance(classes, list) or None in classes:
            continue
        if not any((folder / part).glob("*.json")):
            return f"the folder {part}"
        missing = _missing_in_network(folder / part, folder)
        if missing is not None:
            return missing
    return None


def _missing_in_network(part: Path, folder: Path) -> str | None:
    """Schedulers and tokenizers have no config.json and need no weights."""
    weighty = any(file.stat().st_size > 0 for file in part.glob("*.safetensors"))
    if weighty or not (part / "config.json").is_file():
        return None
    return str((part / "*.safetensors").relative_to(folder))
