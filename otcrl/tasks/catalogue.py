"""Published data sets by name: where each is, and who reads it. Their licences are their makers', and differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Published:
    reader: str  # a name of READERS
    hub: str | None = None  # of the data set; None: it is not on the hub as one
    config: str | None = None  # the variant of it
    splits: Mapping[str, str] = field(default_factory=dict)  # on the hub -> here
    home: str = ""  # where its files are, if it is not on the hub


BOTH = {"train": "train", "validation": "test"}  # the tests of these are secret
CATALOGUE: dict[str, Published] = {
    "nq": Published("plain", "google-research-datasets/nq_open", splits=BOTH),
    "triviaqa": Published("triviaqa", "mandarjoshi/trivia_qa", "unfiltered.nocontext", BOTH),
    "popqa": Published("popqa", "akariasai/PopQA", splits={"test": "test"}),
    "hotpotqa": Published("hotpotqa", "hotpotqa/hotpot_qa", "distractor", BOTH),
    "2wikimultihopqa": Published("hotpotqa", "framolfese/2WikiMultihopQA", splits=BOTH),
    "musique": Published("musique", "dgslibisey/MuSiQue", splits=BOTH),
    "bamboogle": Published("plain", "chiayewken/bamboogle", splits={"test": "test"}),
    "strategyqa": Published("strategyqa", "ChilleD/StrategyQA", splits={"train": "train", "test": "test"}),
    "gsm8k": Published("gsm8k", "openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "math500": Published("math", "HuggingFaceH4/MATH-500", splits={"test": "test"}),
    "aime24": Published("math", "HuggingFaceH4/aime_2024", splits={"train": "test"}),
    "aime25": Published("math", "math-ai/aime25", splits={"test": "test"}),
    "dapo": Published("dapo", "BytedTsinghua-SIA/DAPO-Math-17k", splits={"train": "train"}),
    "search_r1": Published("search_r1", "PeterJinGo/nq_hotpotqa_train", splits={"train": "train", "test": "test"}),
    "torl": Published("torl", home="https://github.com/GAIR-NLP/ToRL, data/torl_data"),
    "toolrl": Published("toolrl", home="https://github.com/qiancheng0/ToolRL, dataset/rlla_4k"),
    "bfcl": Published(
        "bfcl",
        home="https://github.com/ShishirPatil/gorilla, berkeley-function-call-leaderboard/bfcl_eval/data",
    ),
}
