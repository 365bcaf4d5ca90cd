# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
From a comparison's CSV: how far each run forgets, and what it costs, epoch by epoch.

    python eval/results/epoch_curves.py eval/results/smollm2_forget05.csv

writes a PNG of the same name beside the CSV.
"""

import csv
import sys
from itertools import cycle
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


LABELS = {"rkld": "reverse KL (RKLD)", "forward_kl": "forward KL", "npo": "NPO", "whp": "WHP", "grad_diff": "GradDiff"}
COLORS = [f"C{number}" for number in range(10)]
MARKERS = "os^vDPX"  # fewer than the colours, so that the pairs repeat late
PANELS = {
    "ks_d": "D from the retain-only model",
    "forget_prob": "probability of forgotten answers",
    "retain_prob": "probability of retained answers",
}
# A run further off than any target has failed; how far would take the room from the others
LIMITS = {"ks_d": (-0.01, 0.55), "forget_prob": (3e-3, 1.3), "retain_prob": (0, 1.03)}


def main(path: Path) -> None:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    (split,) = {row["split"] for row in rows}
    runs = {}  # (method, setting): {seed: its rows, epoch by epoch}
    for row in rows:
        if row["epoch"]:
            runs.setdefault((row["method"], row["setting"]), {}).setdefault(row["seed"], []).append(row)
    references = {row["method"]: row for row in rows if not row["epoch"]}
    most = max(map(len, runs.values()))
    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 4.2), sharex=True, layout="constrained")
    for panel, (name, title) in zip(panels, PANELS.items(), strict=True):
        for ((method, setting), seeds), marker, color in zip(
            runs.items(), cycle(MARKERS), cycle(COLORS), strict=False
        ):
            label = LABELS.get(method, method) + ("" if setting == "none" else f", {setting}")
            alpha = 1 if len(seeds) == most else 0.5  # what has had fewer seeds than others stands back
            for run in seeds.values():
                epochs, values = ([float(row[column]) for row in run] for column in ("epoch", name))
                panel.plot(epochs, values, marker=marker, color=color, alpha=alpha, label=label)
                label = None
        column = "retain_Q_A_Prob" if name == "retain_prob" else name
        for method, line, label in (("target", ":", "target, before"), ("retain", "--", "retain-only model")):
            panel.axhline(float(references[method][column]), color="grey", linestyle=line, label=label)
        panel.set(title=title, xlabel="epoch", ylim=LIMITS[name])
        if name == "forget_prob":
            panel.set_yscale("log")
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{split}, n = {references['target']['n']}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
