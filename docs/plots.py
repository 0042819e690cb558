"""Draws plots of the docs, from the functions that train and from what benchmarks measured:  python docs/plots.py

The images do not change from one drawing to the next (no dates, no random names), so a test draws them again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from otcrl.algos.functional import group_advantages
from otcrl.rewards.otc import r_tool_grpo, r_tool_ppo

IMAGES = Path(__file__).parent / "images"
CURVES = Path(__file__).parents[1] / "benchmarks/results/systems_curves.json"  # of benchmarks/systems.py
CALLS = range(9)
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "otcrl",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.marker": "o",
    "lines.markersize": 4,
    "savefig.transparent": False,
}


def draw(folder: Path = IMAGES) -> list[Path]:
    """Writes every plot into `folder`; returns their paths."""
    with matplotlib.rc_context(STYLE):
        plots = {"otc-reward": reward(), "otc-advantage": advantages(), "results-training": training()}
        for name, figure in plots.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    return [folder / f"{name}.svg" for name in plots]


def reward() -> Figure:
    """Eq. 5 and Eq. 6 of arXiv:2504.14870: what a right answer with m calls is worth."""
    figure, (left, right) = panels()
    for c in (2, 4, 8):
        curve(left, f"c = {c}", lambda m, c=c: r_tool_ppo(m, c))
    left.set(title="OTC-PPO: cos(mπ / (2m + c))", xlabel="m, calls of this trajectory", ylabel="r_tool")
    for n in (0, 1, 2, 4):
        curve(right, f"n = {n}", lambda m, n=n: r_tool_grpo(m, n, 4))
    right.set(title="OTC-GRPO: the peak is at m = n   (c = 4)", xlabel="m, calls of this trajectory")
    return finished(figure, left, right)


def advantages() -> Figure:
    """What a group of eight right trajectories that differ by one call is taught, with GRPO's division and without."""
    figure, (left, right) = panels()
    for wasteful in (1, 4, 7):
        calls = [1] * (8 - wasteful) + [2] * wasteful
        rewards_B = torch.tensor([r_tool_grpo(m, 1, 4) for m in calls])
        for axes, normalize in ((left, True), (right, False)):
            found = group_advantages(rewards_B, torch.zeros(8, dtype=torch.int64), normalize=normalize)
            axes.plot(range(1, 9), found.tolist(), label=f"{wasteful} of 8 call once too often")
    for axes, title in ((left, "GRPO: (r - mean) / std"), (right, "algo.normalize=false: r - mean")):
        axes.set(title=title, xlabel="trajectory of the group, all of them right")
    left.set_ylabel("advantage")
    return finished(figure, left, right)


def training() -> Figure:
    """Calls in training of both systems, every seed: sums, and search whose second one shows nothing new."""
    figure, panels_2 = panels()
    worlds = {"sums": "sums: OTC and ToRL", "single_hop_same": "search, one hop: OTC and Search-R1"}
    curves = json.loads(CURVES.read_text())
    for axes, (world, title) in zip(panels_2, worlds.items(), strict=True):
        for run, found in curves[world].items():
            is_otc = run.startswith("otc")
            axes.plot(found["calls"], label=run, color="C0" if is_otc else "C1", marker="", alpha=0.8)
        axes.set(title=title, xlabel="training step", ylim=(0, None))
    panels_2[0].set_ylabel("calls of a trajectory")
    return finished(figure, *panels_2)


def panels() -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(8, 3))
    return figure, figure.subplots(1, 2)


def curve(axes: Axes, label: str, value: Callable[[int], float]) -> None:
    axes.plot(CALLS, [value(m) for m in CALLS], label=label)


def finished(figure: Figure, *axes: Axes) -> Figure:
    for each in axes:
        each.legend(frameon=False)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    for path in draw():
        print(path)
