"""A row in the form of each published data set; what they say was written for the tests."""

from __future__ import annotations

import json
from typing import Any

GOLD = "Polonium is an element. Marie Curie found it."
OTHER = "Tin is an element."
MESSAGE = {"role": "user", "content": "Rain in Kochi tomorrow, and in Oslo?"}
FUNCTION = {
    "name": "weather.forecast",
    "description": "What the weather will be.",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "limits": {"type": "tuple", "items": {"type": "float"}},
            "extra": {"type": "any"},
        },
        "required": ["city"],
    },
}
CALL = '{"name": "forecast", "parameters": {"city": "Kochi"}}'
TURN = f"<think> They ask for rain. </think>\n<tool_call>\n{CALL}\n</tool_call>"
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def verl(question: str, truth: object, *, system: str = "", source: str = "made", index: object = 3) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    return {
        "data_source": source,
        "prompt": [*messages, {"role": "user", "content": question}],
        "ability": "any",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": index, "split": "train"},
    }


# reader -> (row, question, answers)
ROWS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "plain": ({"id": "a", "question": "Who?", "golden_answers": ["Curie", "M. Curie"]}, "Who?", ("Curie", "M. Curie")),
    "search_r1": (
        verl("Answer the given question, as in <answer> Beijing </answer>. Question: who?", {"target": ["Curie"]}),
        "who?",
        ("Curie",),
    ),
    "torl": (
        verl("Compute $6 \\cdot 7$.", "42", system="Put your answer in \\boxed{}."),
        "Compute $6 \\cdot 7$.",
        ("42",),
    ),
    "dapo": (verl(DAPO.format("Let $x = 6$.\n\nFind $7x$."), "42"), "Let $x = 6$.\n\nFind $7x$.", ("42",)),
    "toolrl": (
        verl("<user> Rain? </user>", TURN, system="You have tools.", source="rlla"),
        "<user> Rain? </user>",
        (TURN,),
    ),
    "bfcl": (
        {
            "id": "simple_python_7",
            "question": [[MESSAGE]],
            "function": [FUNCTION],
            "ground_truth": [{"weather.forecast": {"city": ["Kochi"], "days": [1, ""]}}],
        },
        MESSAGE["content"],
        ('[{"weather.forecast": {"city": ["Kochi"], "days": [1, ""]}}]',),
    ),
    "triviaqa": (
        {"question": "Who?", "question_id": "t1", "answer": {"value": "Curie", "aliases": ["M. Curie", "Curie"]}},
        "Who?",
        ("Curie", "M. Curie"),
    ),
    "popqa": (
        {"id": 9, "question": "Who?", "possible_answers": '["Curie", "M. Curie"]'},
        "Who?",
        ("Curie", "M. Curie"),
    ),
    "hotpotqa": (
        {
            "_id": "h1",
            "question": "Who?",
            "answer": "Curie",
            "type": "bridge",
            "supporting_facts": [["Polonium", 0], ["Polonium", 1]],
            "context": [["Tin", [OTHER]], ["Polonium", ["Polonium is an element.", " Marie Curie found it."]]],
        },
        "Who?",
        ("Curie",),
    ),
    "musique": (
        {
            "id": "2hop__1",
            "question": "Who?",
            "answer": "Curie",
            "answer_aliases": ["M. Curie"],
            "answerable": True,
            "paragraphs": [
                {"idx": 0, "title": "Tin", "paragraph_text": OTHER, "is_supporting": False},
                {"idx": 1, "title": "Polonium", "paragraph_text": GOLD, "is_supporting": True},
            ],
        },
        "Who?",
        ("Curie", "M. Curie"),
    ),
    "strategyqa": (
        {"qid": "s1", "question": "Is tin a metal?", "answer": True, "facts": []},
        "Is tin a metal?",
        ("yes",),
    ),
    "gsm8k": (
        {"question": "6 bags of 200?", "answer": "6 * 200 = <<6*200=1200>>1,200\n#### 1,200"},
        "6 bags of 200?",
        ("1200",),
    ),
    "math": (
        {"problem": "Half of 1?", "answer": "\\frac12", "unique_id": "test/a/1.json", "level": 2},
        "Half of 1?",
        ("\\frac12",),
    ),
}

# what the same rows look like elsewhere: a reader and what is other about its row
VARIANTS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("plain", {"Question": "Who?", "Answer": "Curie"}, ("Curie",)),  # Bamboogle
    ("plain", {"question": "who", "answer": ["Curie", "M. Curie"]}, ("Curie", "M. Curie")),  # NQ-open
    ("math", {"ID": "2024-I-1", "Problem": "6 * 7?", "Solution": "so \\boxed{42}", "Answer": 42}, ("42",)),  # AIME
    ("math", {"problem": "6 * 7?", "solution": "It is \\boxed{41}, no, \\boxed{42}.", "level": "Level 1"}, ("42",)),
    (
        "triviaqa",
        {"Question": "Who?", "QuestionId": "q", "Answer": {"Value": "Curie", "Aliases": ["C"]}},
        ("Curie", "C"),
    ),
    ("strategyqa", {"qid": "s2", "question": "Is tin a gas?", "answer": False}, ("no",)),
    ("toolrl", {"id": 1, "system": "You have tools.", "user": "Rain?", "output": TURN}, (TURN,)),
    ("toolrl", {"instruction": "You have tools.", "input": "Rain?", "output": TURN}, (TURN,)),
    (
        "hotpotqa",  # as the hub keeps it
        {
            "id": "h1",
            "question": "Who?",
            "answer": "Curie",
            "supporting_facts": {"title": ["Polonium", "Polonium"], "sent_id": [0, 1]},
            "context": {
                "title": ["Tin", "Polonium"],
                "sentences": [[OTHER], ["Polonium is an element.", " Marie Curie found it."]],
            },
        },
        ("Curie",),
    ),
    (
        "hotpotqa",  # a copy of 2WikiMultihopQA with JSON in texts
        {
            "_id": "w1",
            "question": "Who?",
            "answer": "Curie",
            "supporting_facts": '[["Polonium", 0]]',
            "context": json.dumps([["Tin", [OTHER]], ["Polonium", [GOLD]]]),
        },
        ("Curie",),
    ),
]
