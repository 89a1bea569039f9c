"""Which held-out pictures are shown before and after, and what is said of them.

Nothing here picks what looks best. Where a judge says right or wrong, most of the pairs are such as became right, but
some that became wrong and some that stayed are always among them, and all are counted; within each kind they are taken
at even distances from the list of prompts.
"""

from collections.abc import Sequence

from alignprop_pipe.records import Evidence

SHOWN = 12
"""Pairs of pictures that are shown; the run folder's samples/ has all of them."""

KINDS = {"became right": 8, "stayed the same": 2, "became wrong": 2}
"""How many pairs of each kind are shown, where there are as many; other kinds take the places that are left."""


def shown_pairs(before: Evidence, after: Evidence) -> list[int]:
    """The numbers of the prompts whose pictures are shown, kind after kind; without kinds at even distances."""
    kinds = _by_kind(before, after)
    if kinds is None or len(before.prompts) <= SHOWN:
        return _spread(range(len(before.prompts)), SHOWN)
    places = {kind: min(KINDS[kind], len(numbers)) for kind, numbers in kinds.items()}
    for kind, numbers in kinds.items():
        places[kind] += min(SHOWN - sum(places.values()), len(numbers) - places[kind])
    return [number for kind, numbers in kinds.items() for number in _spread(numbers, places[kind])]


def caption(before: Evidence, after: Evidence) -> str:
    """What the pairs are and how they were taken."""
    count, shown = len(before.prompts), shown_pairs(before, after)
    kinds, judge = _by_kind(before, after), next(iter(after.main_judges), "")
    if len(shown) == count:
        which = f"All {before.what}" if count > 1 else f"The one picture: {before.what}"
    elif kinds is None:
        which = f"{len(shown)} of {before.what}, evenly spaced, not chosen by score"
    else:
        counted = [f"{len(n)} {kind} ({len({*n} & {*shown})} shown)" for kind, n in kinds.items()]
        which = f"Of {before.what}, {', '.join(counted)}; of each kind at even distances, not chosen by score"
    said = f" and what the judge {judge} gave it" if judge else ""
    said = f"; the mark is what the judge {judge} says" if kinds is not None else said
    return (
        f"{which}. Left: before. Right: after, with the adapter of step {after.step}. Both pictures of a pair start "
        f"from the same noise. The number is that picture's reward{said}."
    )


def label(look: Evidence, number: int) -> str:
    """The reward of one picture, and what the first judge gave it where that is no plain right or wrong."""
    judge = next(iter(look.main_judges), "")  # there is no room for more under a picture
    names = ["reward", judge] if is_right(look, number) is None else ["reward"]
    known = [look.per_prompt.get(name, ()) for name in names]
    reward, *judged = [f"{values[number]:.3g}" if number < len(values) else "" for values in known]
    return " · ".join(filter(None, (reward, *(f"judge {value}" for value in judged if value))))


def is_right(look: Evidence, number: int) -> bool | None:
    """Whether the first judge calls this picture right; None where there is none, or one that knows more than that."""
    values = _verdicts(look)
    return None if values is None or number >= len(values) else values[number] == 1


def _verdicts(look: Evidence) -> Sequence[float] | None:
    values = look.per_prompt.get(next(iter(look.main_judges), ""), ())
    return values if values and {*values} <= {0.0, 1.0} else None


def _by_kind(before: Evidence, after: Evidence) -> dict[str, list[int]] | None:
    first, last = _verdicts(before), _verdicts(after)
    if first is None or last is None or len(first) != len(last):
        return None
    changes = [now - then for then, now in zip(first, last, strict=True)]
    wanted = {"became right": 1, "stayed the same": 0, "became wrong": -1}
    return {kind: [n for n, change in enumerate(changes) if change == way] for kind, way in wanted.items()}


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    shown = min(count, len(numbers))
    return [numbers[i * len(numbers) // shown] for i in range(shown)]
