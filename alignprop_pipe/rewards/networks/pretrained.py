"""Frozen networks from a Hub id or a folder: safetensors only, nothing half-loaded, errors that say what to do.

Models that bring their own code are refused: transformers would else ask in the terminal whether to run it.
"""

import json
from pathlib import Path
from typing import Any

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards.networks.weights import place_of
from alignprop_pipe.sources import is_folder


def load_network(kind: Any, source: str, revision: str | None = None) -> Any:
    """`kind.from_pretrained`, frozen and in eval mode. Raises RewardError; weights that are missing are an error."""
    source, revision = place_of(source, revision)
    try:
        network, info = kind.from_pretrained(
            source,
            revision=revision or "main",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
    except Exception as error:
        raise not_loaded(source, error) from error
    lost = sorted({*info["missing_keys"], *(_key(entry) for entry in info["mismatched_keys"])})
    if lost:
        raise RewardError(
            f"the weights in {source!r} do not fit its config.json: {len(lost)} are missing or of another shape "
            f"({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}); get the whole folder again from where it came"
        )
    for weight in network.parameters():
        # Out of the mapped file into aligned memory, where sums come out the same, bit for bit, in every run.
        weight.data = weight.data.clone()
    return network.eval().requires_grad_(False)


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The tokenizer of a text model. Raises RewardError."""
    from transformers import AutoTokenizer

    source, revision = place_of(source, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
        # Without its files transformers makes an empty one, to which all texts are the same.
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise OSError("the tokenizer knows no words: tokenizer.json, or vocab.json with merges.txt, is missing")
        return tokenizer
    except Exception as error:
        if "sentencepiece" in str(error).lower():
            raise RewardError(
                f"the tokenizer of {source!r} needs a package that is not installed: pip install sentencepiece protobuf"
            ) from error
        raise not_loaded(source, error) from error


def load_preprocessor_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """What preprocessor_config.json says. Raises RewardError."""
    from transformers import ImageProcessingMixin

    source, revision = place_of(source, revision)
    try:
        return dict(ImageProcessingMixin.get_image_processor_dict(source, revision=revision or "main")[0])
    except Exception as error:
        raise not_loaded(source, error) from error


def load_config(source: str, revision: str | None = None) -> Any:
    """What config.json says, as transformers' class for that kind of model. Raises RewardError."""
    from transformers import AutoConfig

    source, revision = place_of(source, revision)
    try:
        return AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except Exception as error:
        raise not_loaded(source, error) from error


def not_loaded(source: str, error: Exception) -> RewardError:
    """What to do when a model is not there, or is damaged."""
    reason = str(error).strip().split("\n")[0]
    needed = "config.json, model.safetensors, preprocessor_config.json and, for text, the tokenizer's files"
    if is_folder(source):
        held = ", ".join(sorted(path.name for path in Path(source).iterdir())) or "nothing"
        broken = [path.name for path in sorted(Path(source).iterdir()) if not _readable(path)]
        what = f"{', '.join(broken)} is damaged or cut short; get it again" if broken else f"it needs {needed}"
        return RewardError(f"the folder {source!r} cannot be loaded: {what}. It holds: {held}. ({reason})")
    return RewardError(
        f"the model {source!r} cannot be loaded: it is no folder here, and it could not be had from the Hugging Face "
        f"Hub. Check the spelling; or, on a machine with a network, run `hf download {source} --local-dir FOLDER`, "
        f"bring FOLDER here and give its path as model. The folder needs {needed}. ({reason})"
    )


def _key(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry[0])


def _readable(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
    except (SafetensorError, ValueError, OSError):
        return False
    return True
