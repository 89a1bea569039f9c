"""What the object rewards are asked for: names of objects with numbers, from an argument or a prompt set's column.

`{"dog": 2}`, its JSON text, "two" with a column "subject", or "two dogs and a cat" all become {"dog": 2, ...}.
"""

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards.objects.english import MOST, in_vocabulary, number_of, read_objects

Columns = Mapping[str, Any]
"""What the prompt set says of one prompt."""


def counts_for(prompt: str, columns: Columns, vocabulary: Collection[str] | None = None) -> dict[str, int]:
    """How many of each object one picture should show. Raises RewardError where nothing says it."""
    value = columns.get("count")
    if value is None:
        said = {name: number for name, number in read_objects(prompt, vocabulary).items() if number is not None}
        return said or _unsaid("count", "number of objects", 'count({"dog": 2})', '{"dog": 2}', prompt, "two dogs")
    if isinstance(value, Mapping) or (isinstance(value, str) and number_of(value.strip().lower()) is None):
        return counts_from(value, "the column 'count'")
    if columns.get("subject") is None:
        raise RewardError(
            f"the column 'count' is {value!r} for the prompt {prompt!r}: how many of what? Add a column 'subject' with "
            'the name, or write {"dog": 2} into the column'
        )
    return counts_from({columns["subject"]: value}, "the columns 'subject' and 'count'")


def present_for(prompt: str, columns: Columns, vocabulary: Collection[str] | None = None) -> list[str]:
    """The objects that one picture should show. Raises RewardError where nothing says it."""
    for column in ("contains", "subject"):
        if columns.get(column) is not None:
            return names_from(columns[column], f"the column {column!r}")
    said = [name for name, number in read_objects(prompt, vocabulary).items() if number != 0]
    return said or list(_unsaid("contains", "object", 'contains("dog")', '"dog"', prompt, "a dog"))


def absent_for(prompt: str, columns: Columns, vocabulary: Collection[str] | None = None) -> list[str]:
    """The objects that one picture should not show. Raises RewardError where nothing says it."""
    if columns.get("without") is not None:
        return names_from(columns["without"], "the column 'without'")
    said = [name for name, number in read_objects(prompt, vocabulary).items() if number == 0]
    return said or list(_unsaid("without", "unwanted object", 'without("dog")', '"dog"', prompt, "a park without dogs"))


def _unsaid(name: str, what: str, argument: str, cell: str, prompt: str, words: str) -> dict[str, int]:
    raise RewardError(
        f"{name} finds no {what} in the prompt {prompt!r}. There are three ways to say it: an argument, {argument}; a "
        f"column {name!r} in the prompt set, with cells such as {cell}; or the prompt's own words, such as {words!r}"
    )


def counts_from(value: Any, where: str) -> dict[str, int]:
    """A mapping of names to numbers, or its JSON text, or "two dogs and a cat". Raises RewardError."""
    if isinstance(value, str):
        value = _json(value, where) if value.lstrip().startswith("{") else read_objects(value)
    if not isinstance(value, Mapping) or not value:
        raise RewardError(f'{where} is {value!r}: names with numbers are needed, such as {{"dog": 2, "cat": 1}}')
    counts: dict[str, int] = {}
    for name, number in value.items():
        exact = number_of(number.strip().lower()) if isinstance(number, str) else number
        if isinstance(exact, float) and exact.is_integer():
            exact = int(exact)
        if not isinstance(exact, int) or isinstance(exact, bool) or not 0 <= exact <= MOST:
            raise RewardError(f"{where} asks for {name!r}: {number!r}; a whole number from 0 to {MOST} is needed")
        counts[object_name(name, where)] = exact
    return counts


def names_from(value: Any, where: str) -> list[str]:
    """A name, a list of names, its JSON text, or names with commas between them. Raises RewardError."""
    if isinstance(value, str):
        value = _json(value, where) if value.lstrip().startswith("[") else value.split(",")
    if not isinstance(value, list | tuple) or not value:
        raise RewardError(f'{where} is {value!r}: a name such as "dog" is needed, or a list of names')
    return list(dict.fromkeys(object_name(name, where) for name in value))


def object_name(name: Any, where: str) -> str:
    """Lower case, single spaces. Raises RewardError for what is no text."""
    text = " ".join(name.lower().split()) if isinstance(name, str) else ""
    if not text:
        raise RewardError(f"{where} holds the name {name!r}: the name of an object is needed, such as 'dog'")
    return text


def known_name(name: str, vocabulary: Collection[str] | None, source: str) -> str:
    """The detector's word for the object. Raises RewardError that lists near ones for what it never learnt."""
    known = name if vocabulary is None else in_vocabulary(name, vocabulary)
    if known is None:
        close = difflib.get_close_matches(name, list(vocabulary or ()), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it knows: {', '.join(sorted(vocabulary or ()))}"
        raise RewardError(f"the detector {source!r} knows no {name!r}; {hint}")
    return known


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RewardError(f'{where} is {text!r}, which is not JSON: {error}; write for example {{"dog": 2}}') from error
