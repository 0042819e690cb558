"""Runs in a process of its own: questions of reasoning_gym's data sets, and the answers that it knows.

Some data sets draw from sets of words, whose order Python makes up in each process anew: with PYTHONHASHSEED=0, as in
the sandbox that judges answers, a seed means the same questions everywhere.
"""

from __future__ import annotations

import json
import sys

from reasoning_gym.factory import create_dataset


def main() -> None:
    """From stdin {name: settings}; to the file in argv {name: [[question, answer or null], ...]}."""
    made = {name: create_dataset(name, **settings) for name, settings in json.load(sys.stdin).items()}
    found = {
        name: [[entry["question"], None if entry["answer"] is None else str(entry["answer"])] for entry in dataset]
        for name, dataset in made.items()
    }
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
