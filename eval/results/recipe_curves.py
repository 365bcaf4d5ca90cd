# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
From the states that recipes' runs left in their checkpoints: what was forgotten and what was kept, step by step.

    python eval/results/recipe_curves.py full=outputs/smollm2-135m-tofu-rkld-full lora=... qlora=...

writes `smollm2_forget01.csv` and `smollm2_forget01.png` beside this file.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


COLUMNS = ["run", "step", "epoch", "forget_prob", "retain_prob", "forget_loss", "retain_loss", "teacher_gap"]
STYLES = {"full": ("-", "o"), "lora": ("--", "s"), "qlora": (":", "^")}
LABELS = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "4-bit QLoRA"}


def read_run(name: str, output_dir: str) -> list[dict]:
    """Logged steps of the run's last checkpoint."""
    state = max(
        Path(output_dir).glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1])
    )
    history = json.loads(state.read_text())["log_history"]
    return [{"run": name} | {key: row.get(key) for key in COLUMNS[1:]} for row in history if "forget_prob" in row]


def draw(rows: list[dict], path: Path) -> None:
    """One panel for what is forgotten, one for what is kept."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharex=True, sharey=True, layout="constrained")
    for panel, key, title in zip(
        panels, ("forget_prob", "retain_prob"), ("forgotten answers", "retained answers"), strict=True
    ):
        for shade, name in enumerate(STYLES):
            steps = [row for row in rows if row["run"] == name]
            line, marker = STYLES[name]
            panel.plot(
                [row["epoch"] for row in steps],
                [row[key] for row in steps],
                line,
                marker=marker,
                markersize=4,
                color=str(0.15 + 0.25 * shade),
                label=LABELS[name],
            )
        panel.set(title=title, xlabel="epoch", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean p(answer)$^{1/tokens}$")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    folder = Path(__file__).parent
    rows = [row for argument in sys.argv[1:] for row in read_run(*argument.split("=", 1))]
    with open(folder / "smollm2_forget01.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, folder / "smollm2_forget01.png")
