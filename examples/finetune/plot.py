"""The picture of a run: losses of fine-tuning between those before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_losses(path: Path, records: list[dict[str, Any]], before: dict[str, float], after: dict[str, float]) -> None:
    """Draw training losses over steps; held-out losses of both texts, before and after, as a line each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=0.9, alpha=0.8, label="training batch")
        for name, color, label in (("target", "tab:orange", "new text"), ("source", "tab:gray", "text it came from")):
            axes.plot(
                [0, train[-1][0]],
                [before[name], after[name]],
                "o--",
                color=color,
                label=f"held out, {label}: {before[name]:.3f} before, {after[name]:.3f} after",
            )
    axes.set(xlabel="step of fine-tuning", ylabel="loss (nats per token)", title="Fine-tuning with DeepSpeed AutoEP")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
