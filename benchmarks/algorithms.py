"""OTC-GRPO's reward on Atlas with every algorithm, and with GRPO's remedies against sign reversal, from one cold start;
and the additive form of the reward, which the paper rejects.

Every run is an ordinary `otcrl train conf=quickstart`; a run whose summary.json is there is not repeated. Greedy
evaluation meets the optimum nearly always; what tells systems apart is how fast they stop over-calling.

    python benchmarks/algorithms.py --seeds 0 1 2 --systems grpo grpo_no_std grpo_std_floor grpo_keep_sign grpo_sum
    python benchmarks/algorithms.py
    python benchmarks/algorithms.py --runs runs/longer --settings loop.steps=150 --systems grpo grpo_no_std
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

from atlas import train
from common import Row, publish

OPTIMUM = 1.0  # calls, of the training problems: every kind equally often
SYSTEMS = {
    "grpo": [],
    "grpo_no_std": ["algo.normalize=false"],
    "grpo_std_floor": ["algo.std_floor=0.2"],
    "grpo_keep_sign": ["algo.keep_sign=true"],
    "grpo_sum": ["reward.combine=sum"],  # the reward's ablation: few calls pay for wrong answers too
    "dr_grpo": ["algo=dr_grpo", "algo.max_tokens=100"],
    "dapo": ["algo=dapo"],
    "rloo": ["algo=rloo"],
    "reinforce_pp": ["algo=reinforce_pp", "algo.kl_reward_coef=0"],
    "reinforce_pp_baseline": ["algo=reinforce_pp_baseline"],
    "gspo": ["algo=gspo"],
    "cispo": ["algo=cispo"],
    "max_rl": ["algo=max_rl"],
    "ppo": ["algo=ppo", "algo.kl_reward_coef=0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--runs", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--settings", nargs="*", default=[], help="of every run; with others take other --runs")
    options = parser.parse_args()

    rows: list[Row] = []
    for seed in options.seeds:
        train(options.runs / f"grpo-{seed}", seed, options.settings)  # every system starts from its cold start
        start = ["model=pretrained", f"model.path={options.runs}/grpo-{seed}/sft", "model.chat=false", "sft.steps=0"]
        for system in options.systems:
            folder = options.runs / f"{system}-{seed}"
            overrides = [] if system == "grpo" else [*SYSTEMS[system], *start, "evaluate.before=false"]
            summary = train(folder, seed, [*options.settings, *overrides])
            rows.append(row(system, seed, summary, metrics(folder)))
    name = "algorithms" if len(options.systems) == len(SYSTEMS) else "remedies"
    publish(name, [*rows, *means(rows, options.systems)] if len(options.seeds) > 1 else rows, {})


def metrics(folder: Path) -> list[dict[str, float]]:
    """One row for each step; the last line is the evaluation."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][:-1]


def row(system: str, seed: int | str, summary: dict, steps: list[dict[str, float]]) -> Row:
    calls = [step["calls/well_formed"] / OPTIMUM for step in steps]
    reached = next((i for i in range(len(calls) - 2) if max(calls[i : i + 3]) <= 1.1), None)
    return {
        "system": system,
        "seed": seed,
        "sign reversals, steps 0-9": fmean(step["reward/sign_reversals"] for step in steps[:10]),
        "sign reversals, all": fmean(step["reward/sign_reversals"] for step in steps),
        "TC/optimum, steps 5-9": fmean(calls[5:10]) if calls[5:] else None,
        "TC/optimum, steps 10-19": fmean(calls[10:20]) if calls[10:] else None,
        "TC/optimum, last 10": fmean(calls[-10:]),
        "step of TC <= 1.1": reached,
        "right, last 10": fmean(step["reward/correct"] for step in steps[-10:]),
        "EM": summary["after"]["em"],
        "TC/optimum": summary["after"]["tc"] / summary["optimal_tc"],
        "EM sampled": summary["sampled_after"]["em"],
        "TC/optimum sampled": summary["sampled_after"]["tc"] / summary["optimal_tc"],
    }


def means(rows: list[Row], systems: list[str]) -> list[Row]:
    """The mean over the seeds; None where a seed has no value."""

    def mean(values: list[str | int | float | None]) -> float | None:
        numbers = [value for value in values if isinstance(value, int | float)]
        return fmean(numbers) if len(numbers) == len(values) else None

    found: list[Row] = []
    for system in systems:
        own = [r for r in rows if r["system"] == system]
        found.append({"system": system, "seed": "mean"} | {k: mean([r[k] for r in own]) for k in list(own[0])[2:]})
    return found


if __name__ == "__main__":
    main()
