"""Line plots as PNG, drawn with PIL: figures over the guidance scale, and against one another."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unclip_jax.errors import InputError
from unclip_jax.paths import write_whole

SIDE = 360  # pixels of a panel
MARGIN = (64, 16, 46, 30)  # left, right, bottom, top
LARGER = 3  # factor at which lines are drawn before they are made smooth
INK, LINE, PALE = (40, 40, 40), (31, 99, 180), (225, 225, 225)


class Panel(NamedTuple):
    """One plot: points (x, y) that a line joins in their order, each with a label.

    title, x_name, y_name: words. x, y: (N,) finite numbers. labels: N texts; "" for none.
    """

    title: str
    x_name: str
    y_name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str]


def draw_panels(panels: Sequence[Panel]) -> Image.Image:
    """Draws the panels side by side.

    Raises:
      ValueError: if there is no panel, or one has no points, or points that are not finite.
    """
    if not panels:
        raise InputError("a plot needs at least one panel")
    canvas = Image.new("RGB", (SIDE * len(panels), SIDE), "white")
    for i, panel in enumerate(panels):
        canvas.paste(_draw(panel), (i * SIDE, 0))
    return canvas


def save_panels(path: str | os.PathLike, panels: Sequence[Panel]) -> None:
    """Writes `draw_panels(panels)` as PNG. The file appears complete or not at all."""
    file = io.BytesIO()
    draw_panels(panels).save(file, format="PNG")
    write_whole(path, file.getvalue())


def ticks(low: float, high: float, count: int = 5) -> np.ndarray:
    """About `count` round numbers that span [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    spread = high - low or abs(high) or 1.0
    if high == low:
        low, high = low - spread / 2, high + spread / 2
    power = 10.0 ** np.floor(np.log10(spread / count))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= spread / count * 0.99)
    return np.arange(np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9) + 1) * step


def _draw(panel: Panel) -> Image.Image:
    x, y = (np.asarray(values, np.float64) for values in (panel.x, panel.y))
    if x.ndim != 1 or x.shape != y.shape or len(x) != len(panel.labels) or not len(x):
        raise InputError(f"the plot {panel.title!r} needs as many x, y and labels, and at least one")
    if not np.isfinite([x, y]).all():
        raise InputError(f"the plot {panel.title!r} has points that are not finite")
    left, right, bottom, top = MARGIN
    across, up = ticks(x.min(), x.max()), ticks(y.min(), y.max())

    def place(at_x: float, at_y: float) -> tuple[float, float]:
        width, height = SIDE - left - right, SIDE - top - bottom
        return (
            left + width * (at_x - across[0]) / (across[-1] - across[0]),
            SIDE - bottom - height * (at_y - up[0]) / (up[-1] - up[0]),
        )

    points = [place(*point) for point in zip(x, y)]
    smooth = Image.new("RGB", (SIDE * LARGER, SIDE * LARGER), "white")
    draw = ImageDraw.Draw(smooth)
    scaled = lambda *ends: [(LARGER * px, LARGER * py) for px, py in ends]
    for tick in across:
        draw.line(scaled(place(tick, up[0]), place(tick, up[-1])), PALE, LARGER)
    for tick in up:
        draw.line(scaled(place(across[0], tick), place(across[-1], tick)), PALE, LARGER)
    draw.line(scaled(*points), LINE, 2 * LARGER, "curve")
    for px, py in scaled(*points):
        draw.ellipse((px - 10, py - 10, px + 10, py + 10), LINE)
    canvas = smooth.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    _write(ImageDraw.Draw(canvas), panel, across, up, points, place)
    return canvas.convert("RGB")


def _write(draw: ImageDraw.ImageDraw, panel: Panel, across, up, points, place) -> None:
    small, large = ImageFont.load_default(size=11), ImageFont.load_default(size=13)
    for tick in across:
        px, py = place(tick, up[0])
        draw.text((px, py + 5), f"{round(tick, 10):g}", INK, small, "mt")
    for tick in up:
        px, py = place(across[0], tick)
        draw.text((px - 6, py), f"{round(tick, 10):g}", INK, small, "rm")
    draw.text((SIDE / 2, SIDE - 8), panel.x_name, INK, small, "mb")
    draw.text((6, 20), panel.y_name, INK, small, "lm")
    draw.text((SIDE / 2 + 20, 8), panel.title, INK, large, "mt")
    for (px, py), label in zip(points, panel.labels):
        draw.text((px + 7, py - 7), label, INK, small, "lb")
