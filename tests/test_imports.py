"""Imports go one way, and each heavy library has one door."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "otcrl").rglob("*.py"))

# A module may import what stands on its own line or above it, never below.
LAYERS = (
    ("errors", "presets", "manual", "secrets", "bucketing", "packing"),
    ("jsonlines", "sealed"),
    ("types",),
    ("protocols",),
    ("construct", "compose", "checkpoint", "dist", "loggers", "smollm2", "termination"),
    ("saver", "resume"),
    ("algos", "rewards", "rollout", "tools", "tasks", "dialects", "models"),
    ("learner",),
    ("health", "train", "sft", "evaluate", "experiment", "plan", "report", "watch"),
    ("preflight",),
    ("build", "serve", "indexing", "data", "export", "doctor", "completion"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

SERVERS = ("tools/http.py", "tools/sandbox/server.py", "tools/retrieval/server.py")
DOORS = {  # only these files import it
    "vllm": ("rollout/vllm_engine.py",),
    "deepspeed": ("learner/deepspeed_backend.py",),
    "hydra": ("compose.py", "build.py", "cli.py"),
    "omegaconf": ("compose.py", "build.py", "cli.py"),
    "faiss": ("tools/retrieval/",),
    "bm25s": ("tools/retrieval/lexical.py",),
    "wandb": ("loggers/wandb.py",),
    "tensorboard": ("loggers/tensorboard.py",),
    "prometheus_client": ("loggers/prometheus.py", *SERVERS),
    "pydantic": ("construct.py", *SERVERS),
    "fastapi": SERVERS,
    "httpx": ("tools/remote.py",),
    "mcp": ("tools/mcp.py", "tools/mcp_mending.py"),
}
LAZY = {"torch", "transformers", "vllm", "deepspeed", "faiss", "bm25s", "datasets", "wandb", "gguf", "math_verify"}


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Modules that a file imports; those for type checkers alone are not imports."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in tree.body if top_level else ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name, not a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "otcrl"))


def layer(parts: tuple[str, ...]) -> int:
    return RANK[parts[0].removesuffix(".py")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path):
    own = path.relative_to(ROOT / "otcrl").parts
    if own == ("__init__.py",):
        return
    for module in imports(path):
        package, *rest = module.split(".")
        if package == "otcrl" and rest[0] in RANK:
            assert layer(tuple(rest)) <= layer(own), f"{name_of(path)} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_each_heavy_library_has_its_door(path: Path):
    for module in imports(path):
        doors = DOORS.get(module.partition(".")[0])
        if doors is not None:
            assert name_of(path).startswith(doors), f"{name_of(path)} must not import {module}"


def test_the_contract_and_the_command_load_without_anything_heavy():
    code = (
        "import otcrl.types, otcrl.protocols, otcrl.cli, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & (LAZY | {"hydra", "omegaconf", "pydantic", "rich", "numpy"})


def test_every_library_that_is_imported_is_declared():
    setup = (ROOT / "setup.py").read_text().lower().replace("_", "-")
    names = {"yaml": "omegaconf", "faiss": "faiss-cpu", "tokenizers": "transformers", "huggingface_hub": "transformers"}
    names |= {"pydantic_core": "pydantic"}
    third_party = {m.partition(".")[0] for path in FILES for m in imports(path)} - sys.stdlib_module_names - {"otcrl"}
    undeclared = {m for m in third_party if names.get(m, m).lower().replace("_", "-") not in setup}
    assert not undeclared
