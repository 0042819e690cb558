"""`otcrl index`: from a corpus to a directory that answers queries, and what can be learned about one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from otcrl.errors import ConfigError, DataError, nearest
from otcrl.presets import conf_dir

if TYPE_CHECKING:
    from otcrl.tools.retrieval.build import Recipe
    from otcrl.tools.retrieval.corpus import Passage
    from otcrl.tools.retrieval.encode import Encoder
    from otcrl.tools.retrieval.index import Index

ENCODERS = "encoder"  # the folder of conf/ with the presets


def run(words: Sequence[str]) -> int:
    """The exit code of `otcrl index WORDS`."""
    if not words:
        raise ConfigError(f"otcrl index needs a command. Choose from: {', '.join(sorted(COMMANDS))}.")
    name, *rest = words
    if name not in COMMANDS:
        raise ConfigError(f"otcrl index has no command {name!r}.{nearest(name, COMMANDS)}")
    return COMMANDS[name](rest)


def build(words: list[str]) -> int:
    from otcrl.tools.retrieval.build import build_index, derive
    from otcrl.tools.retrieval.dense import METRICS
    from otcrl.tools.retrieval.index import read_manifest

    settings = parsed("build", words)
    base, out = settings.pop("base", None), required("build", settings, "out")
    if base is not None:
        if clash := {"corpus", "shard"} & settings.keys():
            raise ConfigError(f"base={base} has its passages already: leave {min(clash)} out")
        metric = read_manifest(Path(str(base))).metric
        if settings.get("kind") != "bm25" and metric in METRICS:  # as the vectors were made to be compared
            settings.setdefault("metric", metric)
        index = derive(str(base), out, recipe_of(settings))
    else:
        corpus = shard_of(corpus_of(required("build", settings, "corpus")), settings.pop("shard", None))
        words_only = settings.get("kind") == "bm25"
        encoder = None if words_only else encoder_of(settings)
        index = build_index(corpus, encoder, out, recipe_of(settings))
    return show(out, index)


def adopt(words: list[str]) -> int:
    from otcrl.tools.retrieval.build import adopt

    settings = parsed("import", words)
    vectors, corpus, out = (required("import", settings, name) for name in ("vectors", "corpus", "out"))
    encoder = encoder_of(settings)
    refuse_unknown("import", settings, ["vectors", "corpus", "out", "encoder"])
    return show(out, adopt(vectors, corpus_of(corpus), encoder, out))


def info(words: list[str]) -> int:
    from otcrl.tools.retrieval.index import described, read_manifest

    directory = only_directory("info", words)
    table = Table("", directory)
    for name, value in described(read_manifest(Path(directory))).items():
        table.add_row(name, str(value))
    Console().print(table)
    return 0


def check(words: list[str]) -> int:
    from otcrl.tools.retrieval.index import check, read_manifest

    directory = only_directory("check", words)
    if wrong := check(directory):
        raise DataError(f"index {directory} is damaged: {'; '.join(wrong)}")
    print(f"otcrl: {directory} is whole: {read_manifest(Path(directory)).rows} passages, every file as it was built")
    return 0


def evaluate(words: list[str]) -> int:
    from otcrl.tools.retrieval.index import open_index
    from otcrl.tools.retrieval.quality import measure, read_questions

    settings = parsed("eval", words)
    directories, files = (required("eval", settings, name).split(",") for name in ("index", "questions"))
    ks = settings.pop("k", [1, 3, 10])
    if not isinstance(ks, list) or not ks or not all(isinstance(k, int) and k > 0 for k in ks):
        raise ConfigError(f"k must be a list of ranks such as [1,3,10], got {ks!r}")
    refuse_unknown("eval", settings, ["index", "questions", "k"])
    questions = [question for file in files for question in read_questions(file)]
    rows = {directory: measure(open_index(directory), questions, ks) for directory in directories}
    table = Table("index", *next(iter(rows.values())))
    for directory, found in rows.items():
        table.add_row(directory, *(f"{value:.3f}" for value in found.values()))
    Console().print(table)
    return 0


COMMANDS: Mapping[str, Callable[[list[str]], int]] = {
    "build": build,
    "info": info,
    "check": check,
    "import": adopt,
    "eval": evaluate,
}


# -- settings -----------------------------------------------------------------------------------------


def parsed(command: str, words: Sequence[str]) -> dict[str, Any]:
    """Their values by name; files keep whatever characters their names have."""
    from otcrl.compose import parse

    found: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if not text:
            raise ConfigError(f"otcrl index {command}: {word!r} is no setting; write key=value")
        found[name] = (
            text if name in ("corpus", "out", "base", "vectors", "index", "questions") else parse(word).value()
        )
    return found


def required(command: str, settings: dict[str, Any], name: str) -> str:
    if name not in settings:
        raise ConfigError(f"otcrl index {command} needs {name}=...")
    return str(settings.pop(name))


def only_directory(command: str, words: Sequence[str]) -> str:
    if len(words) != 1:
        raise ConfigError(f"otcrl index {command} needs one directory: otcrl index {command} DIR")
    return words[0].removeprefix("index=")


def refuse_unknown(command: str, settings: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in settings:
        raise ConfigError(f"otcrl index {command} has no setting {name!r}.{nearest(name, known)}")


def corpus_of(text: str) -> Iterator[Passage]:
    from otcrl.tools.retrieval.corpus import Corpus, is_hub_name

    paths = text.split(",")
    for path in paths:
        if not Path(path).is_file() and not is_hub_name(path):
            raise DataError(f"corpus: there is no file {path}")
    return iter(Corpus(paths))


def shard_of(corpus: Iterator[Passage], shard: object) -> Iterator[Passage]:
    """`1/4`: every fourth passage, from the second on. All shards together are the corpus."""
    if shard is None:
        return corpus
    number, _, count = str(shard).partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ConfigError(f"shard must be NUMBER/COUNT, from 0/4 to 3/4 for four shards, got {shard!r}")
    return itertools.islice(corpus, int(number), None, int(count))


def encoder_of(settings: dict[str, Any]) -> Encoder:
    """`encoder=PRESET` or `encoder=MODEL`, and `encoder.SETTING=...` on top of it."""
    from otcrl.compose import load
    from otcrl.construct import construct

    name = settings.pop("encoder", "minilm")
    presets = {path.stem: load(path) for path in sorted((conf_dir() / ENCODERS).glob("*.yaml"))}
    own = next((node for node in presets.values() if node.get("model") == name), None)  # with its prefixes and pooling
    node = presets.get(str(name)) or own or from_model(str(name), presets)
    for key in [key for key in settings if key.startswith("encoder.")]:
        node[key.removeprefix("encoder.")] = settings.pop(key)
    return construct(node, "encoder")


def from_model(name: str, presets: Collection[str]) -> dict[str, Any]:
    """Settings for a Hugging Face model that no preset is for."""
    if "/" not in name and not Path(name).exists():
        raise ConfigError(f"encoder={name} is neither a preset nor a model's path or hub name.{nearest(name, presets)}")
    return {"_target_": "otcrl.tools.retrieval.encode.TransformerEncoder", "model": name}


def recipe_of(settings: dict[str, Any]) -> Recipe:
    """What is left of the settings: all are the recipe's."""
    from otcrl.construct import construct_as
    from otcrl.tools.retrieval.build import Bm25, Recipe
    from otcrl.tools.retrieval.dense import KINDS, Dense

    kind, threads = settings.pop("kind", "flat"), settings.pop("threads", None)
    if threads is not None and not (isinstance(threads, int) and threads >= 1):
        raise ConfigError(f"threads must be a number, 1 or more, got {threads!r}")
    if kind not in (kinds := [*KINDS, "bm25", "hybrid"]):
        raise ConfigError(f"kind must be one of {', '.join(kinds)}, got {kind!r}.{nearest(str(kind), kinds)}")
    if "dense" in settings and kind != "hybrid":
        raise ConfigError(f"dense={settings['dense']} is for kind=hybrid; here kind={kind}")
    own = {field.name for field in fields(Bm25)} if kind in ("bm25", "hybrid") else set()
    words = {name: settings.pop(name) for name in own & settings.keys()}
    bm25 = construct_as(Bm25, words, "index build") if own else None
    if kind == "bm25":
        refuse_unknown("build", settings, [*own, "corpus", "out", "shard", "kind"])
        return Recipe(dense=None, bm25=bm25)
    vectors = settings | {"kind": settings.get("dense", "flat") if kind == "hybrid" else kind}
    vectors.pop("dense", None)
    return Recipe(dense=construct_as(Dense, vectors, "index build"), bm25=bm25, threads=threads)


def show(directory: str, index: Index) -> int:
    made = index.manifest.parameters if index.manifest else {}
    found, wanted = made.get("recall_at_10"), made.get("target_recall")
    recall = f", {found:.3f} of the true 10 nearest found" if found is not None else ""
    print(f"otcrl: {index.rows} passages in {directory}{recall}")
    if found is not None and found < wanted:
        print(f"otcrl: warning: target_recall={wanted} is out of reach: more code_bytes, links or lists may help")
    return 0
