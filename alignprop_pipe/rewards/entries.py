"""What there is to know of each reward before it is made: what it measures, its weights, its licence.

A reward's class carries its entry: `entry = RewardEntry(...)` next to `name = "..."`. The files of `rewards/` are read
for them, not imported, so that the list needs no torch; both must therefore be literals. A new reward is one file.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from alignprop_pipe.bundled import MODELS
from alignprop_pipe.errors import RewardError

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardEntry:
    """A reward that has a name.

    The class that carries the entry fills in its `name` and `where` it is, `module:Class`. `summary` says what it
    measures and `range_text` between which numbers. `weights` are the files of the default weights on the Hub, as
    (repository, file), of `size_mb` in all; `bundled` names the model inside this package that is the default instead.
    `memory_mb` is what the default network takes in float32, without activations. A `judge` is only watched. One that
    `combines` is made of other rewards: `min(clip, jpeg)`. `needs_acceptance` names a licence that binds its users: it
    is made only with `accept_license=True`. `registered` is a reward of a user's own; `where` says then where it was
    registered from.

    Examples:
        >>> from alignprop_pipe.rewards import REGISTRY
        >>> REGISTRY["jpeg"].licence
        'no weights'
        >>> str(REGISTRY["jpeg"].make(quality=60))
        'jpeg(quality=60)'
    """

    name: str = ""
    where: str = ""
    summary: str = ""
    licence: str = "no weights"
    size_mb: float = 0.0
    judge: bool = False
    range_text: str = ""
    weights: tuple[tuple[str, str], ...] = ()
    bundled: str = ""
    memory_mb: float = 0.0
    combines: bool = False
    needs_acceptance: str = ""
    registered: type | None = None

    @property
    def here(self) -> bool | None:
        """Whether the default weights are on this machine; None where there are none. Looks into the Hub's cache."""
        if self.bundled:
            return any(model.missing is None for model in MODELS if model.name == self.bundled)
        if not self.weights:
            return None
        from huggingface_hub import try_to_load_from_cache

        return all(isinstance(try_to_load_from_cache(source, file), str) for source, file in self.weights)

    @property
    def kind(self) -> Any:
        """The class, imported if need be."""
        module, _, attribute = self.where.partition(":")
        return self.registered or getattr(import_module(module), attribute)

    def make(self, *args: Any, **kwargs: Any) -> Any:
        """The `Reward` with these arguments. Raises RewardError for arguments that it does not take."""
        kind = self.kind
        try:
            inspect.signature(kind.__init__).bind(None, *args, **kwargs)
        except TypeError as error:
            known = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
            takes = f"it takes: {', '.join(known)}" if known else "it takes no arguments"
            raise RewardError(f"reward {self.name!r}: {error}; {takes}") from error
        return kind(*args, **kwargs)


def entries_in(folder: Path, package: str) -> Iterator[RewardEntry]:
    """The entries that the classes in the Python files of a folder carry, its subfolders included.

    Raises ValueError for an entry or a name that is no literal.
    """
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "RewardEntry(" not in text:
            continue
        module = ".".join((package, *path.relative_to(folder).with_suffix("").parts))
        for kind in (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)):
            said = _assigned(kind)
            if isinstance(call := said.get("entry"), ast.Call):
                if "name" not in said:
                    raise ValueError(f"{path}: {kind.name} has an entry and no name; write name = '...' next to it")
                about = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
                name = ast.literal_eval(said["name"])
                yield RewardEntry(name=name, where=f"{module}:{kind.name}", **about)


def _assigned(kind: ast.ClassDef) -> dict[str, ast.expr]:
    """What the body of a class assigns to a name, with a type or without."""
    found = {}
    for line in kind.body:
        targets = (
            line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and line.value is not None:  # type: ignore[union-attr]
                found[target.id] = line.value  # type: ignore[union-attr]
    return found


ENTRIES = tuple(sorted(entries_in(HERE, "alignprop_pipe.rewards"), key=lambda entry: (entry.combines, entry.name)))
"""The rewards that come with the package: by name, those that are made of other rewards last."""
