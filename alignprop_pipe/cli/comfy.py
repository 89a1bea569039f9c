"""The commands `comfy install` and `comfy uninstall`: the nodes in a ComfyUI on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from alignprop_pipe.cli import console

EXAMPLES = """[bold]Examples[/]

alignprop comfy install ~/ComfyUI

alignprop comfy uninstall ~/ComfyUI"""

comfy = typer.Typer(no_args_is_help=True, help="Put the nodes into a ComfyUI, or take them away.", epilog=EXAMPLES)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="the folder of ComfyUI, the one that holds custom_nodes")]
Debug = Annotated[bool, typer.Option("--debug", help="show where an error happened")]


@comfy.command(epilog=EXAMPLES)
def install(folder: Folder, debug: Debug = False) -> None:
    """Write the folder custom_nodes/alignprop, which hands ComfyUI the nodes of this package.

    The package must be installed for the Python that runs ComfyUI. Twice does no harm.
    """
    with console.translated(debug=debug):
        from alignprop_pipe.comfy_install import install as write

        changed = write(folder)
        for path in changed:
            typer.echo(console.shown(f"wrote {path}"))
        typer.echo("start ComfyUI again: the nodes are under AlignProp" if changed else "all of it is there already")


@comfy.command(epilog=EXAMPLES)
def uninstall(folder: Folder, debug: Debug = False) -> None:
    """Take the folder custom_nodes/alignprop away; LoRA files and pictures stay."""
    with console.translated(debug=debug):
        from alignprop_pipe.comfy_install import uninstall as remove

        gone = remove(folder)
        typer.echo("there is nothing to take away" if gone is None else console.shown(f"removed {gone}"))
