"""The prompt that a picture was drawn from, as the programs that drew it write it into the file.

All of it is text that may come from anybody: it is read as data, in bounded steps, and what is not understood is none.
"""

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

LONGEST = 32 * 2**20
"""Characters of one text that are looked at."""
CONDITIONING = ("positive", "guider", "conditioning")
"""Inputs of ComfyUI's nodes that lead from a sampler to what is wanted in the picture, the surest first."""
TEXTS = ("text", "prompt", "positive_prompt", "text_g", "t5xxl", "clip_l", "text_l", "string", "value")
"""Inputs of ComfyUI's nodes that hold words, the surest first."""
NOT_WORDS = (
    *("model", "clip", "vae", "negative", "image", "latent", "latent_image", "samples", "noise", "sampler", "sigmas"),
)
"""Inputs that lead from a conditioning to something else."""
PARAMETERS_END = re.compile(r"(^|\n)(Negative prompt:|Steps: *\d+ *(,|\n|$))")
EXTRA_NETWORKS = re.compile(r"\s*<(lora|lyco|hypernet):[^<>]*>")
"""What AUTOMATIC1111 takes out of a prompt before a text encoder reads it."""

Graph = Mapping[str, Mapping[str, Any]]


def prompt_in(texts: Mapping[str, str]) -> str | None:
    """The prompt among a picture's texts by name, or None: of this package, ComfyUI, AUTOMATIC1111, Fooocus, InvokeAI.

    `texts` are the chunks of a PNG, and under "UserComment", "Make", "Model" and "ImageDescription" those of EXIF.
    """
    texts = {name: text[:LONGEST] for name, text in texts.items()}
    found = (
        _of_ours_or_comfyui(texts.get("prompt", "")),
        _of_parameters(texts.get("parameters", "")),
        _of_parameters(texts.get("UserComment", "")),
        *(_of_exif(texts.get(tag, "")) for tag in ("Model", "Make", "ImageDescription")),
        _named(texts.get("invokeai_metadata", ""), "positive_prompt"),
        texts.get("Description", "").strip() if texts.get("Software") == "NovelAI" else "",
    )
    return next(filter(None, found), None)


def _of_ours_or_comfyui(text: str) -> str:
    """The text itself, unless it is a graph: braces alone say nothing, since prompts have them (`{red|blue} cat`)."""
    graph = _graph(text)
    return text.strip() if graph is None else _of_graph(graph)


def _of_parameters(text: str) -> str:
    """Of AUTOMATIC1111 and its kin: the prompt comes first, then the negative one, then the settings."""
    if (named := _object(text)) is not None:
        return _named(text, "prompt") if _graph(text) is None else _of_graph(named)
    ends = PARAMETERS_END.search(text)
    return EXTRA_NETWORKS.sub("", text[: ends.start()]).strip() if ends else ""


def _of_exif(text: str) -> str:
    """Of ComfyUI in a WebP: its graph behind `prompt:`."""
    graph = _graph(text.removeprefix("prompt:").removeprefix("Prompt:"))
    return "" if graph is None else _of_graph(graph)


def _named(text: str, name: str) -> str:
    value = (_object(text) or {}).get(name)
    return value.strip() if isinstance(value, str) else ""


def _object(text: str) -> dict[str, Any] | None:
    """A JSON object, or None for any other text."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _graph(text: str) -> Graph | None:
    """ComfyUI's graph: nodes by id, each with its class and its inputs."""
    nodes = {
        name: {"class_type": node["class_type"], "inputs": inputs if isinstance(inputs, dict) else {}}
        for name, node in (_object(text) or {}).items()
        if isinstance(node, dict) and "class_type" in node
        for inputs in (node.get("inputs"),)
    }
    return nodes or None


def _of_graph(graph: Graph) -> str:
    """The words that reach the sampler from which the saved picture comes, or any sampler."""
    saved = [name for name, node in graph.items() if str(node["class_type"]).startswith(("Save", "Preview"))]
    for wanted in CONDITIONING:
        for name in dict.fromkeys((*_upstream(graph, saved), *graph)):
            if (start := _linked(graph, graph[name]["inputs"].get(wanted))) and (words := _words_above(graph, start)):
                return words
    return ""


def _words_above(graph: Graph, start: str) -> str:
    for name in _upstream(graph, [start], without=NOT_WORDS):
        inputs = graph[name]["inputs"]
        for key in TEXTS:
            if isinstance(value := inputs.get(key), str) and value.strip():
                return value.strip()
    return ""


def _upstream(graph: Graph, start: list[str], without: tuple[str, ...] = ()) -> Iterator[str]:
    """Nodes by their distance, each once: a graph of a stranger may go in circles."""
    seen, waiting = set(start), deque(start)
    while waiting:
        name = waiting.popleft()
        yield name
        for key, value in graph[name]["inputs"].items():
            above = _linked(graph, value)
            if above and above not in seen and key not in without:
                seen.add(above)
                waiting.append(above)


def _linked(graph: Graph, value: Any) -> str:
    """The node that an input is linked to; empty where it is no link."""
    name = str(value[0]) if isinstance(value, list) and len(value) == 2 else ""
    return name if name in graph else ""
