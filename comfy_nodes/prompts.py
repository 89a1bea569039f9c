"""The node that holds the prompts to train and to sample with."""

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from . import host
from .widgets import cleaned, fingerprint

TEXT, FILE = "text", "file"


class Prompts(io.ComfyNode):
    """Prompts from the text box, a file, or a set that comes with the package."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from alignprop_pipe.prompts import named_sets

        return host.schema(
            node_id="AlignPropPrompts",
            display_name="Prompts (AlignProp)",
            description="The prompts that a model is aligned on. Some of them are held out as evidence.",
            search_aliases=["alignprop", "prompt list", "dataset"],
            inputs=[
                io.Combo.Input("source", options=[TEXT, FILE, *named_sets()], default=TEXT, tooltip=SOURCE),
                io.String.Input("text", default=EXAMPLE, multiline=True, optional=True, tooltip="one prompt a line"),
                io.String.Input("file", default="", optional=True, tooltip=FILE_TIP),
            ],
            outputs=[host.Prompts.Output(display_name="prompts", tooltip="for Align, Sample and Score")],
        )

    @classmethod
    def fingerprint_inputs(cls, source: str = TEXT, text: str = "", file: str = "") -> str:
        return fingerprint(file) if source == FILE else ""

    @classmethod
    def execute(cls, source: str, text: str = "", file: str = "") -> io.NodeOutput:
        with host.working():
            return io.NodeOutput(loaded(source, text, file))


def loaded(source: str, text: str, file: str) -> Any:
    """The prompts. Raises PromptError."""
    from alignprop_pipe import PromptSet

    if source == TEXT:
        return PromptSet.load([line.strip() for line in text.splitlines() if line.strip()])
    return PromptSet.load(Path(cleaned(file)) if source == FILE else source)


SOURCE = "the text box, a file, or a set that comes with AlignProp (emoji is for the bundled model)"
FILE_TIP = (
    "a .txt file with a prompt a line, or .csv, .tsv or .jsonl with a column 'prompt'; more columns tell rewards what "
    "counts"
)
EXAMPLE = "a fox in the snow\na red bicycle by the sea\ntwo cats on a sofa\na lighthouse at night"
