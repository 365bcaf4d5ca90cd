# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The numbers of a report on a deletion, what they mean, and their picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plots import QUALITY_LINE, STYLE


if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pair = tuple[float | None, float | None]
"""A number before and after."""


@dataclass(frozen=True)
class Number:
    """
    A number of the report.

    Attributes:
        metric (`str`):
            Its name in the log.
        label (`str`):
            Its name in plain words.
        better (`str`):
            Which direction is good for those whom its table is about.
        meaning (`str`):
            What it says, in one sentence.
        drawn (`bool`, *optional*, defaults to `True`):
            Whether the picture shows it: it is in [0, 1], and each step means the same.
    """

    metric: str
    label: str
    better: str
    meaning: str
    drawn: bool = True


FORGET = (
    Number(
        "forget_Q_A_Prob",
        "Probability of the answer",
        "lower",
        "How likely the model finds the answer on record, token by token (geometric mean); mean over the answers.",
    ),
    Number(
        "forget_Q_A_ROUGE",
        "Words given back",
        "lower",
        "Share of the words on record that the model says, in their order, when asked (ROUGE-L recall).",
    ),
    Number(
        "extraction_strength",
        "Completed without error",
        "lower",
        "Share of the answer on record, its end, that the model completes without an error when shown the words before. The "
        "last token always counts: short answers can't come near 0.",
    ),
    Number(
        "exact_memorization",
        "Tokens guessed right",
        "lower",
        "Share of the answer's tokens that are the model's first choice when shown all tokens before them.",
    ),
    Number(
        "mia_min_k",
        "Success of an attack",
        "near 0.5",
        "How well the Min-K% attack tells the records from unseen text (AUC): 0.5 is guessing, 1 and 0 give them away.",
        drawn=False,
    ),
    Number(
        "privleak",
        "Privacy leakage, in %",
        "near 0",
        "Distance from that attack on a model without the records (from guessing where there was none): -100 has "
        "leaked in full, far above 0 is overdone.",
        drawn=False,
    ),
    Number(
        "forget_quality",
        "Forget quality",
        "higher",
        f"p-value of a test against a model that never saw the records; below {QUALITY_LINE} the two can be told apart.",
        drawn=False,
    ),
)
KEEP = (
    Number("retain_Q_A_Prob", "Probability of the answer", "higher", "As above, for the answers to be kept."),
    Number("retain_Q_A_ROUGE", "Words given back", "higher", "As above, for the answers to be kept."),
    Number(
        "retain_utility",
        "Retain utility",
        "higher",
        "Harmonic mean of these two and of how clearly the model prefers the right answers to wrong ones.",
    ),
    Number(
        "model_utility",
        "Model utility",
        "higher",
        "The same over the answers to be kept and questions on real authors and on the world.",
    ),
)
GROUPS = {
    "To be forgotten: good for the person who asked to be deleted": FORGET,
    "To be kept: good for the users of the model": KEEP,
}


def drawn_numbers(group: str, values: Mapping[str, Pair]) -> list[Number]:
    """The numbers of a group (`str`, of `GROUPS`) that the picture shows: both models have them."""
    return [number for number in GROUPS[group] if number.drawn and None not in values[number.metric]]


def draw(values: Mapping[str, Pair]) -> Figure:
    """
    Draw the numbers that both logs have: a hollow dot before, a filled one after, a line between them.

    Args:
        values (`Mapping[str, Pair]`):
            Before and after, by metric.

    Returns:
        `matplotlib.figure.Figure`:
            A figure 7 inches wide, with one panel for the records to be forgotten and one for those to be kept.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {group: drawn for group in GROUPS if (drawn := drawn_numbers(group, values))}
    with rc_context(STYLE):
        lines = max(map(len, groups.values()))
        width, top, bottom, line = 7.0, 0.25, 0.45, 0.2
        height = top + bottom + line * lines
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        figure.subplots_adjust(
            left=1.5 / width, right=1 - 0.12 / width, top=1 - top / height, bottom=bottom / height, wspace=0.85
        )
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, (group, numbers) in zip(panels, groups.items(), strict=True):
            for y, number in enumerate(numbers):
                old, new = values[number.metric]
                axes.plot([old, new], [y, y], color="0.45", linewidth=1.2, zorder=1)
                # The hollow dot is the larger one: both show where they lie on each other.
                before = axes.plot(old, y, **_DOT, markersize=7, markerfacecolor="white", label="before", zorder=2)
                after = axes.plot(new, y, **_DOT, markersize=4, markerfacecolor="black", label="after", zorder=3)
            axes.set_title(group.split(":")[0] + f" ({numbers[0].better} is better)")
            axes.set_yticks(range(len(numbers)), [number.label for number in numbers])
            axes.set_ylim(lines - 0.5, -0.5)
            axes.set_xlim(-0.02, 1.02)
            axes.grid(axis="x", color="0.88", linewidth=0.5)
            axes.set_axisbelow(True)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
            axes.tick_params(axis="y", length=0)
        figure.legend(handles=[*before, *after], loc="lower center", ncols=2, borderaxespad=0.1)
    return figure


_DOT = {"marker": "o", "linestyle": "", "markeredgecolor": "black", "markeredgewidth": 0.9, "clip_on": False}


def to_png(figure: Figure) -> bytes:
    """A figure as a PNG file, the same bytes for the same figure."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()
