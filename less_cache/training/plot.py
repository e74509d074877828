"""A plot of a training run, from its log."""

from typing import Any

from less_cache.reports import plots

SMOOTHED = 20  # steps that a point of the joint curve averages


def draw(log: dict[str, Any]) -> Any:
    """What is left of each layer's error, and the second stage's loss where it ran."""
    stages = [(draw_stage, log[key]) for key, draw_stage in (("layers", draw_layers), ("joint", draw_joint)) if log[key]]
    figure, panels = plots.figure(len(stages))
    for axes, (draw_stage, record) in zip(panels, stages, strict=True):
        draw_stage(axes, record)
    return figure


def draw_layers(axes: Any, records: list[dict]) -> None:
    axes.bar([record["layer"] for record in records], [record["after"] for record in records], color="tab:blue")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(xlabel="layer", ylabel="share of the policy's error left", title="Each layer's own error, stretches drawn anew")


def draw_joint(axes: Any, losses: list[float]) -> None:
    means = [sum(losses[max(0, step - SMOOTHED) : step]) / min(step, SMOOTHED) for step in range(1, len(losses) + 1)]
    axes.plot(range(1, len(losses) + 1), losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="one step")
    axes.plot(range(1, len(losses) + 1), means, color="tab:blue", label=f"mean of {SMOOTHED} steps")
    axes.set(xlabel="step", ylabel="KL to the full cache, nats", title="All layers on the model's output")
    axes.set_ylim(bottom=0)
    axes.legend()
