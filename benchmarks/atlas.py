"""Outcome-only, OTC-PPO and OTC-GRPO on Atlas, from the same cold start, over several seeds.

Every run is an ordinary `otcrl train conf=quickstart`; a run whose summary.json is there is not repeated.

    python benchmarks/atlas.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from common import Row, publish

SYSTEMS = {
    "otc_grpo": [],
    "otc_ppo": ["algo=ppo", "reward=otc_ppo", "algo.kl_reward_coef=0"],
    "outcome": ["reward=outcome"],
}


def train(folder: Path, seed: int, overrides: list[str]) -> dict:
    """The summary of one run, made now or found."""
    summary = folder / "summary.json"
    if not summary.is_file():
        command = [sys.executable, "-m", "otcrl.cli", "train", "conf=quickstart", f"seed={seed}", f"run_dir={folder}"]
        subprocess.run([*command, *overrides], check=True)
    return json.loads(summary.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--runs", type=Path, default=Path("runs/atlas"))
    options = parser.parse_args()

    rows: list[Row] = []
    for seed in options.seeds:
        train(options.runs / f"otc_grpo-{seed}", seed, [])  # every system starts from its cold start
        start = [
            "model=pretrained",
            f"model.path={options.runs}/otc_grpo-{seed}/sft",
            "model.chat=false",
            "sft.steps=0",
        ]
        for system in options.systems:
            overrides = SYSTEMS[system] if system == "otc_grpo" else [*SYSTEMS[system], *start]
            summary = train(options.runs / f"{system}-{seed}", seed, overrides)
            rows.append(row(system, seed, summary))
    ratios = {
        f"{system}_tc_over_optimum": round(fmean(float(r["TC/optimum"] or 0) for r in rows if r["system"] == system), 3)
        for system in options.systems
    }
    publish("atlas", rows, ratios)


def row(system: str, seed: int, summary: dict) -> Row:
    before, after, sampled = summary["before"], summary["after"], summary["sampled_after"]
    return {
        "system": system,
        "seed": seed,
        "EM before": before["em"],
        "TC before": before["tc"],
        "EM": after["em"],
        "TC": after["tc"],
        "TP": after["tp"],
        "optimum": summary["optimal_tc"],
        "TC/optimum": after["tc"] / summary["optimal_tc"],
        "EM sampled": sampled["em"],
        "TC/optimum sampled": sampled["tc"] / summary["optimal_tc"],
        "train s": summary["seconds"]["train"],
    }


if __name__ == "__main__":
    main()
