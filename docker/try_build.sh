#!/bin/bash
# Builds the three images for machines without a GPU and runs what is in them: no daemon, no registry. Needs root, Debian's
# buildah and debootstrap, a package index, 15 GB of disk and some minutes; with podman the sandbox is tried in a real
# container, with compose.yaml's options and without them. Not part of `make test`.
#
#     apt-get install buildah debootstrap podman runc
#     docker/try_build.sh [FOLDER]                 # TORCH_WHEELS=DIR: PyTorch's CPU wheels are there
#
# FOLDER (a new one beneath /tmp if none is named) keeps log and base; the images are removed at the end unless KEEP=1.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
folder=$(realpath "$folder")
store=(--root "$folder/store" --runroot "$folder/run" --storage-driver "${STORAGE_DRIVER:-overlay}")
exec > >(tee "$folder/log") 2>&1
clean() {
    if command -v podman > /dev/null; then podman "${store[@]}" rm --all --force > /dev/null; fi
    if [ -z "${KEEP:-}" ]; then buildah "${store[@]}" rm --all > /dev/null && buildah "${store[@]}" rmi --all --force > /dev/null; fi
}
trap clean EXIT

say() { printf '\n== %s [%d s]\n' "$*" "$SECONDS"; }
build() { buildah "${store[@]}" build --isolation chroot --format docker --layers "$@"; }

say "a base: Debian bookworm"
if [ ! -e "$folder/base/etc/os-release" ]; then
    debootstrap --variant=minbase bookworm "$folder/base" > "$folder/debootstrap.log"
fi
# Where packages come from, and by which certificates, is this machine's affair.
for path in etc/pip.conf usr/local/share/ca-certificates; do
    if [ -e "/$path" ]; then cp -rT "/$path" "$folder/base/$path"; fi
done
base=$(buildah "${store[@]}" from scratch)
buildah "${store[@]}" add --quiet "$base" "$folder/base" / > /dev/null
buildah "${store[@]}" commit --quiet "$base" base > /dev/null

options=(--build-arg BASE_IMAGE=localhost/base --build-arg VARIANT=cpu)
if [ -n "${TORCH_WHEELS:-}" ]; then options+=(--volume "$(realpath "$TORCH_WHEELS"):/wheels:ro" --build-arg TORCH_WHEELS=/wheels); fi
for target in sandbox retrieval trainer; do
    say "build $target"
    build "${options[@]}" --target "$target" --tag "otcrl/$target" --file docker/Dockerfile .
done

say "again, with nothing changed: every layer is there already"
build "${options[@]}" --target trainer --file docker/Dockerfile . | grep -c "Using cache"
say "sizes"
buildah "${store[@]}" images --format '{{.Name}} {{.Size}}'

if ! command -v podman > /dev/null; then
    say "no podman: nothing was run"
    exit
fi
run() { podman "${store[@]}" run --runtime runc --network none --ulimit nofile=1024:1024 --ulimit nproc=4096:4096 --no-healthcheck "$@"; }
# What compose.yaml gives the sandbox, in Podman's words: unmask=ALL is systempaths=unconfined.
locked=(--cap-drop ALL --security-opt no-new-privileges --read-only --tmpfs /tmp)
sandboxed=("${locked[@]}" --security-opt "seccomp=$PWD/docker/seccomp.json" --security-opt unmask=ALL)
export OTCRL_TOKEN=only-here
ask() { # CONTAINER URL JSON
    podman "${store[@]}" exec "$1" python3 -c 'import sys, urllib.request as r
request = r.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json", "Authorization": "Bearer only-here"})
print(r.urlopen(request, timeout=60).read().decode())' "$2" "$3"
}
serve() { # IMAGE [podman options --] [arguments of otcrl]: waits until it is healthy
    container=$(run --detach --env OTCRL_TOKEN "$@")
    until podman "${store[@]}" exec "$container" python3 -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1])' \
        "http://127.0.0.1:$port/health" > /dev/null 2>&1; do
        if [ "$(podman "${store[@]}" inspect --format '{{.State.Running}}' "$container")" != true ]; then break; fi
        sleep 0.5
    done
    podman "${store[@]}" logs "$container"
}
end() { # SIGTERM, as engines end a container
    podman "${store[@]}" stop --time 20 "$container" > /dev/null
    echo "ended with $(podman "${store[@]}" inspect --format '{{.State.ExitCode}}' "$container")"
    podman "${store[@]}" rm "$container" > /dev/null
}

say "who they are, and which build tools they have"
for target in trainer retrieval sandbox; do
    # shellcheck disable=SC2016 # the shell in the container puts the values in
    run --rm --entrypoint sh "otcrl/$target" -c 'echo "$(id -u): $(command -v gcc cc c++ make git pip pip3 || echo none)"'
done

say "otcrl --help"
run --rm otcrl/trainer --help

say "a shortened quickstart; the trainer has its programs in bubblewrap, so it needs what the sandbox needs"
run --rm "${sandboxed[@]}" otcrl/trainer train conf=quickstart run_dir=/tmp/run \
    sft.steps=60 loop.steps=2 task.held_out_per_kind=4 evaluate.before=false evaluate.sampled=false tools.python.workers=1

port=8080
say "the sandbox server as compose.yaml runs it"
serve "${sandboxed[@]}" otcrl/sandbox
ask "$container" http://127.0.0.1:8080/run_code '{"language": "python", "code": "import sympy; print(sympy.factorint(360))"}'
ask "$container" http://127.0.0.1:8080/run_code '{"language": "python", "code": "import os; os.listdir(\"/home\")"}'
end

say "without a token, and in a container as it is by default: it does not start"
run --rm otcrl/sandbox || true
run --rm --env OTCRL_TOKEN "${locked[@]}" otcrl/sandbox || true

say "an index, and the retrieval server"
install --directory --owner 10001 "$folder/indexes"
run --rm --volume "$PWD/otcrl/small/tiny_qa:/data:ro" --volume "$folder/indexes:/indexes" otcrl/retrieval \
    index build corpus=/data/corpus.jsonl out=/indexes/tiny encoder=hashing
port=8000
serve "${locked[@]}" --volume "$folder/indexes/tiny:/index:ro" otcrl/retrieval
ask "$container" http://127.0.0.1:8000/retrieve '{"queries": ["Which river flows through Paris?"], "topk": 1}'
end
say "done"
