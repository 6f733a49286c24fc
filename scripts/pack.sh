#!/usr/bin/env bash
# Packs what a machine without Rust needs to run everything on its GPU: sqz, the plugin, llama.cpp's programs and libraries, ggml's
# backends, the CUDA tests, those of the attention op and of selections, and benches, all in one folder `bin` of OUT/ggml-squeeze.tar.xz (about
# 35 MB), without debug information.
# There: tar xJf ggml-squeeze.tar.xz; export LD_LIBRARY_PATH=$PWD/bin SQZ_BACKENDS=$PWD/bin; scripts/gpu.sh bin ...
# Usage: pack.sh OUT     Needs make plugin, scripts/llama.sh and scripts/ggml-cuda.sh.
set -euo pipefail
[[ $# == 1 ]] || { echo "usage: pack.sh OUT" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$root"
export CUDA_HOME=${CUDA_HOME:-$(scripts/cuda.sh)}

# Names of the executables that cargo makes for a target of the library with its GPU tests.
built() { # built test|bench NAME...
    local kind=$1 names=()
    shift
    for name in "$@"; do names+=("--$kind" "$name"); done
    local command=(cargo "$kind" --no-run --message-format=json -p ggml-squeeze --features gpu-tests "${names[@]}")
    [[ $kind == bench ]] || command+=(--release)
    # A folder of its own: other features would build llama.cpp for sqz again.
    CARGO_TARGET_DIR=$target/gpu "${command[@]}" | sed -nE 's/.*"executable":"([^"]+)".*/\1/p'
}

tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
mkdir "$tmp/bin"
crate=$(dirname "$(ls -td "$target"/release/build/llama-cpp-sys-2-*/out/backends | head -n 1)")
cp -a "$crate"/lib/*.so* "$tmp/bin/"
for variant in x64 haswell skylakex icelake sapphirerapids zen4; do cp "$crate/backends/libggml-cpu-$variant.so" "$tmp/bin/"; done
cp "$(scripts/ggml-cuda.sh)/libggml-cuda.so" "$tmp/bin/"
for program in llama-bench llama-completion llama-server test-backend-ops; do cp "$target/llama/bin/$program" "$tmp/bin/"; done
cp "$target/release/sqz" "$tmp/bin/"
cp "$target/release/libggml_squeeze.so" "$tmp/bin/libggml-squeeze.so"
for file in $(built test cuda kmeans_cuda); do name=$(basename "$file"); cp "$file" "$tmp/bin/test-${name%-*}"; done
for name in op selection gpu_host gpu_faults; do
    file=$(cargo test --release --workspace --test "$name" --no-run --message-format=json | sed -nE '/"name":"'"$name"'"/s/.*"executable":"([^"]+)".*/\1/p')
    cp "$file" "$tmp/bin/test-$name"
done
for file in $(built bench cuda kmeans_cuda); do name=$(basename "$file"); cp "$file" "$tmp/bin/bench-${name%-*}"; done
find "$tmp/bin" -type f -exec strip --strip-unneeded {} +
# One dictionary over all: the kernels are in most of the programs.
tar c -C "$tmp" bin | xz --lzma2=preset=6,dict=256MiB > "$out/ggml-squeeze.tar.xz"
ls -l "$out/ggml-squeeze.tar.xz"
