"""The command `push`: a run folder -> a repository on the Hugging Face Hub, or the folder that would go there."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignprop_pipe.cli import completing, console
from alignprop_pipe.cli.options import OUTPUT, options_from
from alignprop_pipe.sources import exists, expanded, is_folder

if TYPE_CHECKING:
    from alignprop_pipe.records import Pushed

PUSH_EXAMPLES = """[bold]Examples[/]

alignprop push runs/my-run me/cute-animals --dry-run   [dim]# look at it first, in runs/my-run/hub[/]

alignprop push runs/my-run me/cute-animals --private

alignprop push runs/my-run team/cute-animals --create-pr"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushRequest:
    """What `alignprop push` is asked for. The token is no flag: what is typed stays in a shell's history."""

    run_folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_FOLDER",
            help="the run folder, or an adapter file without a run",
            autocompletion=completing.runs,
        ),
    ]
    repo_id: Annotated[str, typer.Argument(metavar="NAME", help="where to: me/name; made if it is not there")]
    private: Annotated[bool, typer.Option("--private", help="make the new repository private")] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="write what would be uploaded to RUN_FOLDER/hub, and send nothing")
    ] = False
    revision: Annotated[
        str | None, typer.Option(help="the branch, made if it is not there (default: the main one)")
    ] = None
    create_pr: Annotated[bool, typer.Option("--create-pr", help="open a pull request instead")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="only the last lines", rich_help_panel=OUTPUT)] = False
    json: Annotated[
        bool, typer.Option("--json", help="records as JSON lines on stdout, talk on stderr", rich_help_panel=OUTPUT)
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error", rich_help_panel=OUTPUT)] = (
        False
    )


@options_from(PushRequest)
def push(request: PushRequest) -> None:
    """Put the adapter of RUN_FOLDER, a model card and its evidence on the Hugging Face Hub as NAME.

    The token is that of 'hf auth login', or HF_TOKEN. No path, user's name or token goes along. Running it again
    sends what changed, and nothing where nothing did.
    """
    output = console.Output(quiet=request.quiet, json=request.json)
    folder = expanded(request.run_folder)
    beside = folder if is_folder(folder) else folder.parent
    if not exists(folder):
        raise typer.BadParameter(f"there is no run folder {str(request.run_folder)!r}", param_hint="RUN_FOLDER")
    output.say(f"getting {folder.name} ready for {request.repo_id}")  # no spinner: uploads draw bars of their own
    console.quiet_libraries(output)
    from alignprop_pipe.adapters.adapter import Adapter

    pushed = Adapter.load(folder).push_to_hub(
        request.repo_id,
        private=True if request.private else None,
        revision=request.revision,
        create_pr=request.create_pr,
        dry_run=beside / "hub" if request.dry_run else None,
    )
    _tell(output, pushed)


def _tell(output: console.Output, pushed: "Pushed") -> None:
    """The list of files, and where they are."""
    rows = [(name, f"{size:,}") for name, size in pushed.files.items()]
    total = sum(pushed.files.values())
    title = f"{console.counted(len(rows), 'file')}, {total:,} bytes"
    output.table(title, ("file", "bytes"), rows, numbers=True)
    facts = {"repo_id": pushed.repo_id, "files": pushed.files, "changed": pushed.changed}
    output.record("push", {**facts, "url": pushed.url, "folder": pushed.folder})
    if pushed.folder is not None:
        output.result(f"nothing was sent; all of it is in {pushed.folder}")
    elif not pushed.changed:
        output.result(f"{pushed.repo_id} holds all of it already: {pushed.url}")
    else:
        output.result(f"pushed: {pushed.url}")
