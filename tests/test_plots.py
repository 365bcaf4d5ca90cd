# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import csv
import io
import struct
import subprocess
import sys

import matplotlib
import numpy as np
import pytest

from unlearn_eval import plots


def rows():
    result = []
    for split, n, target in (("forget01", 40, 2e-3), ("forget05", 200, 3e-16), ("forget10", 400, 1e-40)):
        result.append({"split": split, "method": "target", "n": n, "forget_quality": target, "model_utility": 0.6})
        result.append({"split": split, "method": "retain", "n": n, "forget_quality": None, "model_utility": 0.58})
        for method, gain in (("RKLD", 1.0), ("NPO", 0.5)):
            for epoch in (3, 1, 2):  # any order
                result.append(
                    {
                        "split": split,
                        "method": method,
                        "setting": "LoRA",
                        "seed": 0,
                        "epoch": epoch,
                        "chosen": epoch == 2,
                        "n": n,
                        "forget_quality": target ** (1 - gain * epoch / 3),
                        "ks_d": 0.1,
                        "model_utility": 0.6 - 0.05 * epoch / gain,
                    }
                )
    return result


@pytest.mark.parametrize("floor", [0.04, 1e-3, 1e-12, 1e-200])
def test_axis_is_increasing_continuous_and_invertible(floor):
    forward, inverse = plots.quality_scale(floor)
    p = np.concatenate([np.geomspace(floor, 0.05, 400), np.linspace(0.05, 1, 400)[1:]])
    assert (np.diff(forward(p)) > 0).all()
    assert inverse(forward(p)) == pytest.approx(p, rel=1e-9)
    below, line, above = forward(np.array([0.05 * (1 - 1e-9), 0.05, 0.05 * (1 + 1e-9)]))
    assert line == 0 and below == pytest.approx(0, abs=1e-8) and above == pytest.approx(0, abs=1e-8)
    # Linear above the line, logarithmic below it, the whole axis of height 1.
    assert forward(0.525) == pytest.approx(forward(1.0) / 2)
    assert forward(np.sqrt(0.05 * floor)) == pytest.approx(forward(floor) / 2)
    assert forward(1.0) - forward(floor) == pytest.approx(1)
    assert np.isfinite(forward(np.array([0.0, -1.0]))).all()


def test_axis_needs_a_floor_below_the_line():
    for floor in (0.0, 0.05, 2.0):
        with pytest.raises(ValueError, match="`floor` must be above 0 and below 0.05"):
            plots.quality_scale(floor)


def test_files_and_their_reproduction(tmp_path):
    settings = dict(matplotlib.rcParams)
    paths = plots.write_plots(rows(), tmp_path / "new", stem="figure3")
    assert [path.name for path in paths] == ["figure3.png", "figure3.svg", "figure3.md", "figure3.csv"]
    png, svg, _, _ = (path.read_bytes() for path in paths)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width == 2100 and 700 < height < 1000, "7 inches at 300 dpi, three panels"
    assert svg.lstrip().startswith(b"<?xml") and b"<dc:date>" not in svg
    again = plots.write_plots(rows(), tmp_path / "again")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    assert dict(matplotlib.rcParams) == settings


def test_one_panel_is_as_wide_as_a_column(tmp_path):
    png = plots.write_plots([row for row in rows() if row["split"] == "forget05"], tmp_path)[0].read_bytes()
    assert struct.unpack(">I", png[16:20]) == (1020,), "3.4 inches at 300 dpi"


def test_what_the_picture_shows():
    figure = plots.draw(rows())
    assert [axes.get_title() for axes in figure.axes] == [
        "forget01 (n = 40)",
        "forget05 (n = 200)",
        "forget10 (n = 400)",
    ]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["RKLD (LoRA)", "NPO (LoRA)", "chosen epoch", "target", "retain-only"]

    lines = [(line.get_xdata(), line.get_ydata(), line) for line in figure.axes[1].lines]
    # A path runs from the target through the epochs in order, whatever the order of the rows.
    x, y, _ = next(line for line in lines if len(line[0]) == 4)
    assert list(x) == pytest.approx([0.6, 0.55, 0.5, 0.45])
    assert list(y) == pytest.approx([3e-16, 3e-16 ** (2 / 3), 3e-16 ** (1 / 3), 1.0])
    chosen = [(x[0], y[0]) for x, y, line in lines if len(x) == 1 and line.get_markersize() == 6.5]
    assert (pytest.approx(0.5), pytest.approx(3e-16 ** (1 / 3))) in chosen
    retain_only = [(x[0], y[0]) for x, y, line in lines if line.get_marker() == "*"]
    assert retain_only == [(0.58, 1.0)], "a retain-only model's forget quality is 1 by definition"
    # Series differ in marker and in line style: readable without colour.
    handles = figure.legends[0].legend_handles[:2]
    assert len({handle.get_marker() for handle in handles}) == len({handle.get_linestyle() for handle in handles}) == 2

    # Far below the limit a point is drawn at the limit, and the axis says so.
    axes = figure.axes[2]
    target = next(line for line in axes.lines if line.get_marker() == "X")
    assert target.get_ydata()[0] == plots.QUALITY_LIMIT
    assert r"$\leq\!10^{-30}$" in [label.get_text() for label in axes.get_yticklabels()]
    for axes in figure.axes:
        assert {0.05, 1.0} <= set(axes.get_yticks())
        labels = [label for label in axes.get_yticklabels() if label.get_text()]
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:], strict=False)), "tick labels overlap"


def test_legend_and_panels_share_the_page_without_overlap():
    many = rows() + [row | {"method": f"method {i}"} for i in range(14) for row in rows() if row["method"] == "NPO"]
    for subset in (many, [row for row in many if row["split"] == "forget01"]):
        figure = plots.draw(subset)
        figure.canvas.draw()
        legend = figure.legends[0].get_window_extent()
        panels = [axes.get_tightbbox() for axes in figure.axes]
        assert legend.y1 <= min(box.y0 for box in panels)
        assert all(left.x1 <= right.x0 for left, right in zip(panels, panels[1:], strict=False))
        for box in (legend, *panels):
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_tables():
    text = plots.rows_to_csv(rows())
    table = list(csv.DictReader(io.StringIO(text)))
    assert tuple(table[0]) == plots.COLUMNS and len(table) == 24
    assert table[1]["forget_quality"] == "" and float(table[0]["forget_quality"]) == 2e-3
    npo = next(row for row in table if row["split"] == "forget05" and row["method"] == "NPO" and row["epoch"] == "1")
    assert float(npo["forget_quality"]) == 3e-16 ** (1 - 0.5 / 3), "all digits"

    lines = plots.rows_to_markdown(rows()).splitlines()
    assert len(lines) == 26 and len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[6].strip("|").split("|")]
    assert cells == ["forget01", "RKLD", "LoRA", "0", "2", "yes", "40", "0.126", "0.1", "0.5", "-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "unknown column `colour` at 0: use split, method"),
        ({"split": None}, "no `split` at 0"),
        ({"method": ""}, "no `method` at 0"),
        ({"forget_quality": -2.5}, r"forget_quality = -2.5 at 0: give a number in \[0, 1\], not a logarithm"),
        ({"model_utility": float("nan")}, "model_utility = nan at 0"),
        ({"model_utility": None}, "no row with both `forget_quality` and `model_utility`"),
    ],
)
def test_faulty_rows_write_nothing(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        plots.write_plots([rows()[0] | change], tmp_path)
    with pytest.raises(ValueError, match="`rows` is empty"):
        plots.write_plots([], tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_pyplot(tmp_path):
    code = (
        "import sys; from unlearn_eval import plots;"
        "plots.write_plots([{'split': 's', 'method': 'm', 'forget_quality': 0.0, 'model_utility': 0.5}], sys.argv[1]);"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
