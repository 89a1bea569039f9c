"""Records -> PNG: the curve of a run, and the sheet of held-out pictures before and after."""

import io
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from alignprop_pipe.escaping import one_line
from alignprop_pipe.files import SHEET_CHUNK, write_whole
from alignprop_pipe.images import png_bytes, to_pil
from alignprop_pipe.records import Evidence, StepRecord
from alignprop_pipe.runs import pairs

SMALL = 128
"""Pictures up to this many pixels are enlarged in whole pixels, not smoothed."""

LONGEST_LABEL = 40
"""Letters of a line's name next to the curve."""


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a drawing, as CSS hex. `held_out` has one for each line of a panel."""

    page: str
    ink: str
    soft: str
    line: str
    batch: str
    held_out: tuple[str, ...]
    right: str
    wrong: str


LIGHT = Theme(
    "#ffffff", "#1c2430", "#5b6675", "#dfe3e9", "#2166c4", ("#c2570c", "#0f7b5f", "#8d3fa8", "#7a6a00", "#b03060"),
    right="#0f7b3f", wrong="#c0262d",
)  # fmt: skip
DARK = Theme(
    "#1a2028", "#e6eaf0", "#98a3b3", "#2e3742", "#6fa8f5", ("#f0965a", "#4cc3a0", "#cf8ee6", "#d1bd4a", "#f28aa8"),
    right="#4cc38a", wrong="#f2707a",
)  # fmt: skip


# --- pictures --------------------------------------------------------------------------------------------------------


def thumbnail(image: Float[Tensor, "3 height width"]) -> bytes:
    """A file to put into a page: PNG for small pictures, JPEG of at most 384 pixels for others."""
    shown = to_pil(image)
    if max(shown.size) <= SMALL:
        return png_bytes(shown)
    shown.thumbnail((384, 384))
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def draw_before_after(before: Evidence, after: Evidence, path: str | Path) -> None:
    """Write a sheet of labelled pairs. Raises RunError; ValueError where an evaluation holds no images."""
    if before.images is None or after.images is None or not before.prompts:
        raise ValueError("draw_before_after needs two evaluations that hold images")
    size = _cell(*before.images.shape[-2:])
    margin, gap, line = 24, 8, 20
    card_width = 2 * size[0] + gap
    titles = {
        number: _wrapped(before.prompts[number], _font(bold=True), card_width, lines=2)
        for number in pairs.shown_pairs(before, after)
    }
    head = max(map(len, titles.values())) * line + 4
    card_height = head + size[1] + 3 + line
    columns = min(len(titles), max(1, round(1250 / (card_width + margin))))
    width = max(480, margin + columns * (card_width + margin))
    caption = _wrapped(pairs.caption(before, after), _font(), width - 2 * margin, lines=5)
    top = margin + math.ceil(len(titles) / columns) * (card_height + margin)
    sheet = Image.new("RGB", (width, top + len(caption) * line + margin), LIGHT.page)
    pen = ImageDraw.Draw(sheet)
    for place, (number, words) in enumerate(titles.items()):
        x, y = margin + place % columns * (card_width + margin), margin + place // columns * (card_height + margin)
        _write(pen, (x, y + head - 4 - len(words) * line), words, LIGHT.ink, bold=True)
        for left, name, look, image in (
            (x, "before", before, before.images[number]),
            (x + size[0] + gap, "after", after, after.images[number]),
        ):
            sheet.paste(_scaled(to_pil(image), size), (left, y + head))
            at = (left, y + head + size[1] + 3)
            if (right := pairs.is_right(look, number)) is not None:
                _write(pen, at, ["✓" if right else "✗"], LIGHT.right if right else LIGHT.wrong, bold=True)
                at = (at[0] + 18, at[1])
            words = _wrapped(f"{name}  {pairs.label(look, number)}", _font(), size[0] + left - at[0], lines=1)
            _write(pen, at, words, LIGHT.soft)
    _write(pen, (margin, top), caption, LIGHT.soft)
    write_whole(path, png_bytes(sheet, {SHEET_CHUNK: "before and after"}))


def _cell(height: int, width: int) -> tuple[int, int]:
    """Width and height at which a picture is shown: whole multiples of small ones."""
    longest = max(height, width)
    scale = max(1, 192 // longest) if longest <= 192 else min(320, longest) / longest
    return max(1, round(width * scale)), max(1, round(height * scale))


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.NEAREST if size[0] >= image.width else Image.Resampling.LANCZOS)


@cache
def _font(bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), 14)


def _write(pen: ImageDraw.ImageDraw, at: tuple[int, int], rows: list[str], color: str, bold: bool = False) -> None:
    for number, row in enumerate(rows):
        pen.text((at[0], at[1] + number * 20), row, font=_font(bold), fill=color)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` rows of `width` pixels, broken at blanks where that goes, cut with an ellipsis."""
    rows, rest = [], " ".join(text.encode("utf-8", "replace").decode().split())
    while rest and len(rows) < lines:
        fits = max((n for n in range(1, min(len(rest), width) + 1) if font.getlength(rest[:n]) <= width), default=1)
        if fits < len(rest):
            blank = rest.rfind(" ", 0, fits + 1)
            fits = blank if blank > 0 else fits
        rows.append(rest[:fits])
        rest = rest[fits:].lstrip()
    if rest:
        last = rows[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        rows[-1] = last.rstrip() + "…"
    return rows or [""]


# --- rows of pictures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """Pictures of one size under a title; `notes` are the lines of text under each of them."""

    title: str
    images: tuple[Image.Image, ...]
    notes: tuple[tuple[str, ...], ...]


def rows_sheet(heads: Sequence[str], rows: Sequence[Row], caption: str) -> Image.Image:
    """Rows of pictures on one sheet, the columns under `heads`, and at its foot what is to be seen."""
    size = _cell(rows[0].images[0].height, rows[0].images[0].width)
    margin, gap, line = 24, 8, 20
    lines = max(len(note) for row in rows for note in row.notes)
    width = max(480, 2 * margin + len(heads) * (size[0] + gap) - gap)
    words = _wrapped(caption, _font(), width - 2 * margin, lines=6)
    step = line + 4 + size[1] + 3 + lines * line + gap
    top = margin + line + 4
    canvas = Image.new("RGB", (width, top + len(rows) * step + gap + len(words) * line + margin), LIGHT.page)
    pen = ImageDraw.Draw(canvas)
    places = [margin + number * (size[0] + gap) for number in range(len(heads))]
    for x, head in zip(places, heads, strict=True):
        _write(pen, (x, margin), _wrapped(head, _font(bold=True), size[0], lines=1), LIGHT.ink, bold=True)
    for number, row in enumerate(rows):
        y = top + number * step
        _write(pen, (margin, y), _wrapped(row.title, _font(), width - 2 * margin, lines=1), LIGHT.ink)
        for x, image, note in zip(places, row.images, row.notes, strict=True):
            canvas.paste(_scaled(image.convert("RGB"), size), (x, y + line + 4))
            texts = [_wrapped(text, _font(), size[0], lines=1)[0] for text in note]
            _write(pen, (x, y + line + 4 + size[1] + 3), texts, LIGHT.soft)
    _write(pen, (margin, top + len(rows) * step + gap), words, LIGHT.soft)
    return canvas


# --- curve -----------------------------------------------------------------------------------------------------------


def draw_curve(
    records: Sequence[StepRecord], looks: Sequence[Evidence], path: str | Path, kept: Evidence | None = None
) -> None:
    """Write the run's curve: reward, judges, diversity and distance over the steps. Raises RunError.

    Args:
        records: the optimizer steps so far; there may be none yet.
        looks: the evidence in the order it was taken.
        path: a PNG file.
        kept: the evaluation of the adapter that is kept, which gets a ring.
    """
    write_whole(path, curve_png(records, looks, LIGHT, kept))


def curve_png(
    records: Sequence[StepRecord], looks: Sequence[Evidence], theme: Theme, kept: Evidence | None = None
) -> bytes:
    """The curve as a PNG file in the colours of `theme`."""
    panels = _panels(records, looks, theme, kept)
    heights = [height for _, height, _ in panels]
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        size = (10, sum(heights) + 0.35 * len(heights) + 0.3)
        figure = Figure(figsize=size, facecolor=theme.page)
        figure.set_layout_engine("constrained", h_pad=0.12)
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, _, draw) in zip(rows, panels, strict=True):
            draw(axes)
            _dress(axes, title, theme)
        last = max([1, *(record.step for record in records), *(look.step for look in looks)])
        rows[-1].set_xlim(-0.02 * last - 0.05, 1.02 * last + 0.05)
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        rows[-1].set_xlabel("optimizer step", color=theme.soft)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={SHEET_CHUNK: "curve"})
    return buffer.getvalue()


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of up to `window` values round each one; values that are not finite are left out of it."""
    half = window // 2
    near = ([v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)] for i in range(len(values)))
    return [statistics.fmean(group) if group else math.nan for group in near]


def _panels(
    records: Sequence[StepRecord], looks: Sequence[Evidence], theme: Theme, kept: Evidence | None
) -> list[tuple[str, float, Callable[[Axes], None]]]:
    """Title, height in inches, and what draws the panel."""
    panels: list[tuple[str, float, Callable[[Axes], None]]] = []
    of = "held-out" if all(look.held_out for look in looks) else "training"
    ring = -1 if kept is None else kept.step
    panels.append(("Reward", 3.0, lambda axes: _reward_panel(axes, records, looks, theme, ring)))
    judges = dict.fromkeys(name for look in looks for name in look.judges)
    lines = {name: [look.judges.get(name, math.nan) for look in looks] for name in judges}
    if lines:
        title = f"Judges on {of} prompts (never trained on)"
        panels.append((title, 2.0, lambda axes: _look_panel(axes, looks, lines, theme, ring)))
    spread = {"diversity": [look.diversity for look in looks]}
    if any(math.isfinite(look.diversity) for look in looks):
        title = f"Diversity of pictures of {of} prompts"
        panels.append((title, 1.3, lambda axes: _look_panel(axes, looks, spread, theme, ring, from_zero=True)))
    if any(record.distance is not None for record in records):
        panels.append(("Distance to the base model", 1.3, lambda axes: _distance_panel(axes, records, theme)))
    return panels


def _reward_panel(
    axes: Axes, records: Sequence[StepRecord], looks: Sequence[Evidence], theme: Theme, ring: int
) -> None:
    steps = [record.step for record in records]
    rewards = [_finite(record.reward) for record in records]
    window = max(1, len(records) // 8) | 1  # odd: the mean then stands over its middle
    if records:
        style: dict[str, Any] = {"alpha": 0.35, "lw": 1} if window > 1 else {"lw": 1.5}
        axes.plot(steps, rewards, color=theme.batch, marker=_dots(records), ms=4, label="each training step", **style)
    if window > 1:
        axes.plot(steps, smoothed(rewards, window), color=theme.batch, lw=2.2, label=f"mean of {window} steps")
    if looks:
        name = "held-out prompts" if looks[0].held_out else "training prompts, fresh noise"
        _look_line(axes, looks, [look.reward for look in looks], theme.held_out[0], name, ring)
    skipped = [record.step for record in records if record.skipped]
    if skipped:
        low, floor = axes.get_xaxis_transform(), [0.03] * len(skipped)
        axes.plot(skipped, floor, "x", color=theme.ink, ms=6, transform=low, label="skipped")
    if any(look.step == ring for look in looks):
        axes.plot([], [], "o", ms=10, mfc="none", mec=theme.soft, mew=1.5, label="adapter that is kept")
    if records or looks:
        axes.legend(**_legend(theme))


def _look_panel(
    axes: Axes,
    looks: Sequence[Evidence],
    lines: Mapping[str, Sequence[float]],
    theme: Theme,
    ring: int,
    *,
    from_zero: bool = False,
) -> None:
    for number, (name, values) in enumerate(lines.items()):
        _look_line(axes, looks, values, theme.held_out[number % len(theme.held_out)], name, ring)
    if from_zero:
        top = max((v for values in lines.values() for v in values if math.isfinite(v)), default=0)
        axes.set_ylim(0, 1.25 * top or 1)
    if len(lines) > 1 or not from_zero:
        axes.legend(**_legend(theme))


def _look_line(
    axes: Axes, looks: Sequence[Evidence], values: Sequence[float], color: str, name: str, ring: int
) -> None:
    order = sorted(range(len(looks)), key=lambda i: looks[i].step)
    steps, heights = [looks[i].step for i in order], [_finite(values[i]) for i in order]
    # Names come from anybody: matplotlib reads $ as mathematics, leaves out what begins with an underscore, and makes
    # room for a long one until no curve is left.
    lines = textwrap.wrap(one_line(name), LONGEST_LABEL, max_lines=4, placeholder="…") or [""]
    label = "\n".join(lines).replace("$", r"\$")
    label = f" {label}" if label.startswith("_") else label
    axes.plot(steps, heights, color=color, lw=1.2, ls="--", marker="o", ms=5, label=label, zorder=3)
    for height in [_finite(values[i]) for i in order if looks[i].step == ring][-1:]:
        axes.plot(ring, height, "o", ms=10, mfc="none", mec=color, mew=1.5, zorder=4)


def _distance_panel(axes: Axes, records: Sequence[StepRecord], theme: Theme) -> None:
    far = [math.nan if record.distance is None else _finite(record.distance) for record in records]
    axes.plot([r.step for r in records], far, color=theme.batch, lw=1.2, marker=_dots(records), ms=4)


def _dots(records: Sequence[StepRecord]) -> str | None:
    """Markers while there are few points: a line of one step shows nothing without."""
    return "o" if len(records) < 25 else None


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _legend(theme: Theme) -> dict[str, Any]:
    # Next to the axes: inside, it would sooner or later cover the line that matters.
    beside = {"loc": "upper left", "bbox_to_anchor": (1.005, 1.04), "borderaxespad": 0}
    return {**beside, "frameon": False, "labelcolor": theme.ink, "fontsize": 9, "handlelength": 1.6}


def _dress(axes: Axes, title: str, theme: Theme) -> None:
    axes.set_facecolor(theme.page)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=theme.ink)
    axes.grid(axis="y", color=theme.line, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.soft, length=0)
    axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-4, 5))
    for edge, spine in axes.spines.items():
        spine.set_visible(edge == "bottom")
        spine.set_color(theme.line)
