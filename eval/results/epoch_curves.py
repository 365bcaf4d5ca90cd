# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
From a comparison's CSV: how far each run forgets, and what it costs, epoch by epoch.

    python eval/results/epoch_curves.py eval/results/smollm2_forget05.csv

writes a PNG of the same name beside the CSV.
"""

import csv
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


LABELS = {"rkld": "reverse KL (RKLD)", "forward_kl": "forward KL"}
MARKERS = "os^v"
PANELS = {
    "ks_d": "D from the retain-only model",
    "forget_prob": "probability of forgotten answers",
    "retain_prob": "probability of retained answers",
}


def main(path: Path) -> None:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    runs = dict.fromkeys((row["method"], row["setting"]) for row in rows if row["epoch"])
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10, 3), sharex=True, layout="constrained")
    for panel, (name, title) in zip(panels, PANELS.items(), strict=True):
        for marker, (method, setting) in zip(MARKERS, runs, strict=False):
            run = [row for row in rows if (row["method"], row["setting"]) == (method, setting)]
            label = LABELS.get(method, method) + ("" if setting == "none" else f", {setting}")
            epochs, values = ([float(row[column]) for row in run] for column in ("epoch", name))
            panel.plot(epochs, values, marker=marker, label=label)
        (target,) = (row for row in rows if row["method"] == "target")
        before = target["retain_Q_A_Prob" if name == "retain_prob" else name]
        panel.axhline(float(before), color="grey", linestyle=":", label="target, before")
        panel.set(title=title, xlabel="epoch", ylim=(0, 0.5 if name == "ks_d" else 1))
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].legend(loc="lower left")
    figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
