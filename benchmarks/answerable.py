"""Questions that a corpus answers: those whose best passage, as the search tool shows it, holds an answer.

    python benchmarks/answerable.py DIR/nq_open/train.jsonl.gz --index indexes/multihop --out DIR/nq/train.jsonl.gz

NQ-open comes without passages. A row of the result names the passage (`gold_ids`), so that demonstrations can be made.
`--again` keeps those alone whose passage is also the best for its own title: who looks that up learns nothing new.
A question that is there twice, word by word, is kept once; the rest keep their order.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from otcrl.rewards.matching import mentions
from otcrl.tasks.records import read_problems
from otcrl.tools.retrieval.index import open_index

BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("questions", nargs="+", help="files of questions")
    parser.add_argument("--index", type=Path, default=Path("indexes/multihop"))
    parser.add_argument("--words", type=int, default=40, help="of a passage that are shown")
    parser.add_argument("--again", action="store_true", help="only where its title finds the passage again")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl.gz file")
    options = parser.parse_args()

    read = [p for source in options.questions for p in read_problems(source, skip_bad_rows=True)]
    problems = list({p.question: p for p in read}.values())
    index = open_index(options.index)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = 0
    with gzip.open(options.out, "wt", encoding="utf-8") as file:
        for start in range(0, len(problems), BATCH):
            some = problems[start : start + BATCH]
            found = [hits[0].passage for hits in index.search([p.question for p in some], 1)]
            titles = [hits[0].passage for hits in index.search([p.title for p in found], 1)] if options.again else found
            for problem, passage, again in zip(some, found, titles, strict=True):
                shown = " ".join(passage.text.split()[: options.words])
                if passage.id == again.id and any(mentions(shown, answer) for answer in problem.answers):
                    row = {"id": problem.id.replace("/", "-"), "question": problem.question}
                    row |= {"answers": list(problem.answers), "gold_ids": [passage.id]}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    kept += 1
    print(f"{options.out}: {kept} of {len(problems)} questions")


if __name__ == "__main__":
    main()
