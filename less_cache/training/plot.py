"""A picture of a training run, from its log."""

import json
from pathlib import Path

from matplotlib.figure import Figure

SMOOTHED = 20  # steps that a point of the joint curve averages


def draw(log_path: Path, picture: Path) -> None:
    """Left, what the first stage left of each layer's error; right, the second stage's loss."""
    log = json.loads(log_path.read_text())
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers = [record["layer"] for record in log["layers"]]
    left.bar(layers, [record["after"] for record in log["layers"]], color="tab:blue")
    left.axhline(1, color="gray", linewidth=0.8)
    left.set(xlabel="layer", ylabel="share of the policy's error left", title="Each layer on its own (held out)")
    losses = log["joint"]
    means = [sum(losses[max(0, step - SMOOTHED) : step]) / min(step, SMOOTHED) for step in range(1, len(losses) + 1)]
    right.plot(range(1, len(losses) + 1), losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="one step")
    right.plot(range(1, len(losses) + 1), means, color="tab:blue", label=f"mean of {SMOOTHED} steps")
    right.set(xlabel="step", ylabel="KL to the full cache, nats", title="All layers on the model's output")
    right.set_ylim(bottom=0)
    right.legend()
    figure.savefig(picture, dpi=120)
