#!/bin/bash
# Writes docker/locks/ anew: what the images install, every package with its version and hashes, from setup.py and
# constraints/cpu.txt. Needs uv (pip install uv) and a package index; give it a folder or page with PyTorch's CPU wheels.
#
#     TORCH_WHEELS=DIR_OR_URL docker/lock.sh          # after a change of setup.py or constraints/
#     docker/lock.sh --upgrade                        # newer versions of what constraints/ leaves open
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=${TORCH_WHEELS:-https://download.pytorch.org/whl/cpu/torch/}

lock() { # NAME [uv's arguments]
    echo "docker/locks/$1.txt" >&2
    uv pip compile --quiet --universal --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --generate-hashes --no-annotate --no-build-package torch \
        --custom-compile-command docker/lock.sh --output-file "docker/locks/$1.txt" "${@:2}"
}
