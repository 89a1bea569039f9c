"""Wrong values of flags in words of ours: Typer checks them with pydantic, whose own words would reach the user."""

from typing import Any

import typer
from typer.core import TyperGroup

NEEDED = (
    ("int", "a whole number"),
    ("float", "a number"),
    ("finite", "a finite number"),
    ("bool", "yes or no"),
    ("greater_than_equal", "{ge} or more"),
    ("greater_than", "more than {gt}"),
    ("less_than_equal", "{le} or less"),
    ("less_than", "less than {lt}"),
)
"""What the kind of a mistake begins with, and what is needed then."""


class Commands(TyperGroup):
    """A group of commands whose flags say what came and what is needed."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """As Typer does, for the flags of the group itself."""
        try:
            return super().make_context(*args, **kwargs)
        except typer.BadParameter as error:
            error.message = plain_words(error)
            raise

    def invoke(self, ctx: Any) -> Any:
        """As Typer does, for the flags of every command in the group."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = plain_words(error)
            raise


def plain_words(error: typer.BadParameter) -> str:
    """The message of an error; one of pydantic's in words of ours."""
    mistakes: Any = getattr(error.__cause__, "errors", list)()
    if not mistakes:
        return error.message
    mistake: dict[str, Any] = mistakes[0]
    came = str(mistake["input"])
    came = repr(came if len(came) < 80 else f"{came[:79]}…")
    for kind, needed in NEEDED:
        if mistake["type"].startswith(kind):
            return f"{came}: {needed.format(**mistake.get('ctx', {}))} is needed"
    said = str(mistake.get("ctx", {}).get("error", "")).rstrip(".")
    return f"{came} cannot be used here" if not said or "null" in said else said
