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
MARKERS = "os^vDPX*<>"
PANELS = {
    "ks_d": "D from the retain-only model",
    "forget_prob": "probability of forgotten answers",
    "retain_prob": "probability of retained answers",
}


def main(path: Path) -> None:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    (split,) = {row["split"] for row in rows}
    runs = dict.fromkeys((row["method"], row["setting"]) for row in rows if row["epoch"])
    styles = [(marker, f"C{color}") for color, marker in enumerate(MARKERS)]
    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 4.2), sharex=True, layout="constrained")
    for panel, (name, title) in zip(panels, PANELS.items(), strict=True):
        for (method, setting), (marker, color) in zip(runs, cycle(styles), strict=False):
            ours = [row for row in rows if (row["method"], row["setting"]) == (method, setting)]
            label = LABELS.get(method, method) + ("" if setting == "none" else f", {setting}")
            seeds = dict.fromkeys(row["seed"] for row in ours)
            for seed in seeds:
                run = [row for row in ours if row["seed"] == seed]
                epochs, values = ([float(row[column]) for row in run] for column in ("epoch", name))
                # What has been run once stands back
                panel.plot(epochs, values, marker=marker, color=color, label=label, alpha=1 if len(seeds) > 1 else 0.4)
                label = None
        (target,) = (row for row in rows if row["method"] == "target")
        before = float(target["retain_Q_A_Prob" if name == "retain_prob" else name])
        panel.axhline(before, color="grey", linestyle=":", label="target, before")
        # A run further off than the target was has failed; how far would take the room from the others
        panel.set(title=title, xlabel="epoch", ylim=(0, 1.15 * before if name == "ks_d" else 1))
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{split}, n = {target['n']}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
