# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Figure 3 of the RKLD paper (model utility against forget quality) and the table of its rows.

matplotlib is imported where it is used, always on its Agg canvas: no window, no pyplot, no lasting settings.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .documents import markdown_table
from .files import write_atomically


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

COLUMNS = (
    "split",
    "method",
    "setting",
    "seed",
    "epoch",
    "chosen",
    "n",
    "forget_quality",
    "ks_d",
    "model_utility",
    "retain_utility",
    "forget_prob",
    "forget_rouge",
    "extraction_strength",
)
UTILITIES = ("model_utility", "retain_utility")
TARGET, RETAIN_ONLY = "target", "retain"
"""The two values of `method` that are reference marks, not series."""

QUALITY_LINE = 0.05
LEAST_SPAN = 0.05
"""Least width of the utility axis: a smaller one would make much of nothing."""
QUALITY_LIMIT = 1e-30
"""Smaller p-values are drawn at this one: the differences among them tell nothing, and would squeeze all others."""

# Told apart without colour by marker and line style; the lengths share no factor, so no combination returns soon.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#A07000", "#882255", "#6E6E6E")
MARKERS = ("o", "s", "^", "D", "v", "P", "<", "h", ">", "p", "d")
LINE_STYLES = ("-", (0, (4, 1.5)), (0, (4, 1.2, 1, 1.2)), (0, (1, 1.2)), (0, (7, 1.5)))

STYLE = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "svg.hashsalt": "trl-rkld",  # element names in the SVG, random otherwise
}


def write_plots(
    rows: Sequence[Row], output_dir: str | Path, stem: str = "forget_quality", utility: str = "model_utility"
) -> list[Path]:
    """
    Write the picture as PNG (300 dpi) and SVG and its rows as markdown and CSV. The same rows give the same bytes.

    Args:
        rows (`Sequence[Row]`):
            See [`draw`].
        output_dir (`str` or `Path`):
            The folder, created where absent.
        stem (`str`, *optional*, defaults to `"forget_quality"`):
            Name of the four files before the dot.
        utility (`str`, *optional*, defaults to `"model_utility"`):
            See [`draw`].

    Returns:
        `list[Path]`:
            The four files.

    Raises:
        [`ValueError`]: If the rows are faulty or nothing can be drawn; then nothing is written.
    """
    from matplotlib import rc_context

    files = {"md": rows_to_markdown(rows).encode("utf-8"), "csv": rows_to_csv(rows).encode("utf-8")}
    figure = draw(rows, utility)
    with rc_context(STYLE):
        for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, dpi=300, metadata=metadata)
            files[form] = buffer.getvalue()
    paths = []
    for suffix in ("png", "svg", "md", "csv"):
        path = Path(output_dir) / f"{stem}.{suffix}"
        write_atomically(path, files[suffix])
        paths.append(path)
    return paths


def draw(rows: Sequence[Row], utility: str = "model_utility") -> Figure:
    """
    Draw model utility (x) against forget quality (y): one panel a split, one series a method, epochs as a path.

    The y axis is linear above a dotted line at p = 0.05, where an unlearned model can't be told from a retain-only
    one, and logarithmic below it. Each panel has its own, since p-values of splits of different length can't be
    compared. A path starts at the target model and runs through the epochs; the chosen epoch is large and filled.
    Source: Figure 3 of https://huggingface.co/papers/2406.01983.

    Args:
        rows (`Sequence[Row]`):
            Mappings with the keys in `COLUMNS`; all but `split` and `method` may be `None` or absent. `method` is
            `"target"` and `"retain"` for the reference marks. Rows without utility or forget quality are not drawn (a
            retain-only model's forget quality is 1 by definition).
        utility (`str`, *optional*, defaults to `"model_utility"`):
            Column of the x axis: `"model_utility"`, or `"retain_utility"` for models that never knew real authors and
            world facts.

    Returns:
        `matplotlib.figure.Figure`:
            A figure 3.4 to 7 inches wide, for one or two columns of a page.

    Raises:
        [`ValueError`]: If a column is unknown, a value out of range, or no row can be drawn.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    points = _drawable(rows, utility)
    splits = sorted({row["split"] for row in points})
    labels = list(dict.fromkeys(_label(row) for row in points if row["method"] not in (TARGET, RETAIN_ONLY)))
    styles = {
        label: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINE_STYLES[i % len(LINE_STYLES)],
        }
        for i, label in enumerate(labels)
    }
    with rc_context(STYLE):
        # Laid out by hand, in inches: matplotlib's own layouts let a long legend squeeze the panels.
        width = min(7.0, max(3.4, 2.35 * len(splits)))
        legend_columns = max(1, int(width / (0.6 + 0.06 * max(map(len, [*labels, "chosen epoch"])))))
        legend_height = 0.165 * math.ceil((len(labels) + 3) / legend_columns) + 0.05
        left, right, top, bottom, gap, panel_height = 0.62, 0.1, 0.25, 0.42 + legend_height, 0.55, 1.95
        height = top + panel_height + bottom
        panel_width = (width - left - right - gap * (len(splits) - 1)) / len(splits)
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        figure.subplots_adjust(
            left=left / width,
            right=1 - right / width,
            top=1 - top / height,
            bottom=bottom / height,
            wspace=gap / panel_width,
        )
        panels = figure.subplots(1, len(splits), sharex=True, squeeze=False)[0]
        for split, axes in zip(splits, panels, strict=True):
            _draw_panel(axes, split, [row for row in points if row["split"] == split], styles, utility)
        low, high = (limit([row[utility] for row in points]) for limit in (min, max))
        margin = max(0.08 * (high - low), (LEAST_SPAN - (high - low)) / 2)
        panels[0].set_xlim(low - margin, high + margin)  # shared by all panels
        panels[0].set_ylabel("forget quality (p-value)")
        for axes in panels:
            axes.set_xlabel(utility.replace("_", " "))

        handles = [Line2D([], [], label=label, markersize=4, **_hollow(style)) for label, style in styles.items()]
        if any(row.get("chosen") for row in points):
            handles.append(Line2D([], [], label="chosen epoch", color="0.35", linestyle="", marker="o", **_CHOSEN))
        present = {row["method"] for row in points}
        handles += [Line2D([], [], **mark) for name, mark in _REFERENCES.items() if name in present]
        figure.legend(handles=handles, loc="lower center", ncols=legend_columns, columnspacing=1.4, borderaxespad=0.2)
    return figure


def missing_coordinates(row: Row, utility: str = "model_utility") -> list[str]:
    """
    What a row lacks to be drawn.

    Args:
        row (`Row`):
            See [`draw`].
        utility (`str`, *optional*, defaults to `"model_utility"`):
            See [`draw`].

    Returns:
        `list[str]`:
            `"forget_quality"`, the utility, both or none. A retain-only model needs no forget quality.
    """
    needed = [utility] if row["method"] == RETAIN_ONLY else ["forget_quality", utility]
    return [column for column in needed if row.get(column) is None]


def quality_scale(floor: float) -> tuple[Callable, Callable]:
    """
    The y axis: linear above 0.05, logarithmic below, continuous and increasing.

    Args:
        floor (`float`):
            The smallest p-value on the axis, below 0.05. The log part gets up to 55 % of the height, less if there are
            few decades to show.

    Returns:
        `tuple[Callable, Callable]`:
            The transform, which takes [floor, 1] to [-low, 1 - low] with 0.05 at 0, and its inverse.

    Raises:
        [`ValueError`]: If `floor` is not between 0 and 0.05.
    """
    if not 0 < floor < QUALITY_LINE:
        raise ValueError(f"`floor` must be above 0 and below {QUALITY_LINE}, not {floor}.")
    decades = math.log10(QUALITY_LINE / floor)
    low = min(0.55, 0.14 * decades)

    def forward(p: np.ndarray) -> np.ndarray:
        p = np.asarray(p, dtype=float)
        linear = (p - QUALITY_LINE) / (1 - QUALITY_LINE) * (1 - low)
        # matplotlib asks for values off the axis as well, 0 among them.
        log = np.log10(np.maximum(p, 1e-300) / QUALITY_LINE) / decades * low
        return np.where(p >= QUALITY_LINE, linear, log)

    def inverse(y: np.ndarray) -> np.ndarray:
        y = np.asarray(y, dtype=float)
        linear = QUALITY_LINE + y / (1 - low) * (1 - QUALITY_LINE)
        log = QUALITY_LINE * 10 ** (np.minimum(y, 0) / low * decades)
        return np.where(y >= 0, linear, log)

    return forward, inverse


def rows_to_csv(rows: Sequence[Row]) -> str:
    """
    The rows as CSV with the columns of `COLUMNS`, all digits, `None` as an empty field.

    Args:
        rows (`Sequence[Row]`):
            See [`draw`].

    Returns:
        `str`:
            The text, with a heading line.

    Raises:
        [`ValueError`]: If a row is faulty.
    """
    _check(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([row.get(column) for column in COLUMNS] for row in rows)
    return text.getvalue()


def rows_to_markdown(rows: Sequence[Row]) -> str:
    """
    The rows as a markdown table, numbers rounded to three significant digits, `None` as a dash.

    Args:
        rows (`Sequence[Row]`):
            See [`draw`].

    Returns:
        `str`:
            The table, ending in a newline.

    Raises:
        [`ValueError`]: If a row is faulty.
    """
    _check(rows)

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else ""
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    cells = [COLUMNS, *([cell(row.get(column)) for column in COLUMNS] for row in rows)]
    return markdown_table(cells, ["<"] * 3 + [">"] * (len(COLUMNS) - 3))


_CHOSEN = {"markersize": 6.5, "markeredgecolor": "black", "markeredgewidth": 0.8}
_REFERENCE = {"color": "black", "linestyle": "", "markeredgecolor": "white"}
_REFERENCES = {
    TARGET: {"label": "target", "marker": "X", "markersize": 6.5, **_REFERENCE},
    RETAIN_ONLY: {"label": "retain-only", "marker": "*", "markersize": 9, **_REFERENCE},
}


def _hollow(style: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "linewidth": 1.0,
        "markerfacecolor": "white",
        "markeredgecolor": style["color"],
        "markeredgewidth": 0.8,
        **style,
    }


def _label(row: Row) -> str:
    return row["method"] if row.get("setting") is None else f"{row['method']} ({row['setting']})"


def _check(rows: Sequence[Row]) -> None:
    if not rows:
        raise ValueError("`rows` is empty: give at least one result.")
    for index, row in enumerate(rows):
        unknown = [column for column in row if column not in COLUMNS]
        if unknown:
            raise ValueError(f"`rows` has an unknown column `{unknown[0]}` at {index}: use {', '.join(COLUMNS)}.")
        for column in ("split", "method"):
            if not row.get(column):
                raise ValueError(f"`rows` has no `{column}` at {index}: every result needs one.")
        for column in ("forget_quality", *UTILITIES):
            value = row.get(column)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(
                    f"`rows` has {column} = {value} at {index}: give a number in [0, 1], not a logarithm."
                )


def _drawable(rows: Sequence[Row], utility: str) -> list[dict[str, Any]]:
    """The rows that have both coordinates."""
    if utility not in UTILITIES:
        raise ValueError(f"`utility={utility!r}` is not one of {', '.join(UTILITIES)}.")
    _check(rows)
    points = [dict(row) for row in rows if not missing_coordinates(row, utility)]
    for row in points:
        if row.get("forget_quality") is None:
            row["forget_quality"] = 1.0
    if not points:
        raise ValueError(
            f"`rows` has no row with both `forget_quality` and `{utility}`: evaluate with `retain_logs`. Of records of your "
            "own there is no `model_utility`: use `utility=retain_utility`."
        )
    return points


def _draw_panel(
    axes: Axes, split: str, points: Sequence[Row], styles: Mapping[str, Mapping[str, Any]], utility: str
) -> None:
    smallest = min(row["forget_quality"] for row in points)
    lowest = max(smallest, QUALITY_LIMIT)
    # A little air below the lowest point; three decades at least, so that the log part is there to be seen.
    floor_exponent = min(-3, math.floor(math.log10(lowest) * 1.04))

    def coordinates(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
        return [row[utility] for row in rows], [max(row["forget_quality"], lowest) for row in rows]

    axes.set_yscale("function", functions=quality_scale(10.0**floor_exponent))
    axes.set_ylim(10.0**floor_exponent, 1.03)
    step = next(step for step in (1, 2, 5, 10) if -floor_exponent <= 5 * step)
    ticks = {10.0**e: f"$10^{{{e}}}$" for e in range(-max(step, 2), floor_exponent - 1, -step)}
    ticks |= {value: f"{value:.2f}" for value in (QUALITY_LINE, 0.25, 0.5, 0.75, 1.0)}
    if smallest < QUALITY_LIMIT:
        ticks[QUALITY_LIMIT] = rf"$\leq\!10^{{{round(math.log10(QUALITY_LIMIT))}}}$"
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.axhline(QUALITY_LINE, color="0.3", linestyle=":", linewidth=0.9, zorder=1)
    axes.grid(color="0.92", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

    series: dict[tuple, list[Row]] = {}
    for row in points:
        series.setdefault((row["method"], row.get("setting"), row.get("seed")), []).append(row)
    targets = [row for row in points if row["method"] == TARGET]
    for (method, setting, _), path in series.items():
        if method in _REFERENCES:
            axes.plot(*coordinates(path), **_REFERENCES[method], clip_on=False, zorder=5)
            continue
        style = styles[_label(path[0])]
        path = sorted(path, key=lambda row: math.inf if row.get("epoch") is None else row["epoch"])
        start = [row for row in targets if row.get("setting") in (None, setting)][:1]
        axes.plot(
            *coordinates([*start, *path]), color=style["color"], linestyle=style["linestyle"], linewidth=1.0, zorder=2
        )
        axes.plot(*coordinates(path), **_hollow(style) | {"linestyle": ""}, markersize=3.6, clip_on=False, zorder=3)
        chosen = path if len(path) == 1 else [row for row in path if row.get("chosen")]
        axes.plot(
            *coordinates(chosen),
            color=style["color"],
            marker=style["marker"],
            linestyle="",
            **_CHOSEN,
            clip_on=False,
            zorder=4,
        )
    counts = {row["n"] for row in points if row.get("n") is not None}
    axes.set_title(f"{split} (n = {counts.pop()})" if len(counts) == 1 else split)
