#!/usr/bin/env bash
# Builds the llama.cpp programs that tests and demo use, unmodified, and prints their folder (target/llama/bin). libllama,
# ggml and its backends are not compiled again: they are the ones that cargo built for the crate llama-cpp-sys-2.
# Usage: llama.sh     JOBS=N limits the parallel compilations (default: all cores). Up to date: no work, under a second.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${CARGO_TARGET_DIR:-$root/target}/llama
programs=(llama-cli llama-completion llama-server llama-bench test-backend-ops ggml-rpc-server)
fail() { echo "llama.sh: $*" >&2; exit 1; }

# The crate's build script forwards GGML_* and CMAKE_* to cmake: settings meant for running must not change the build.
for name in $(compgen -e | grep -E '^(GGML|CMAKE)_'); do unset "$name"; done

if ! command -v cmake > /dev/null; then
    python3 -m pip install --quiet --disable-pip-version-check --target "$out/python" cmake==3.31.6 >&2
    export PATH=$out/python/cmake/data/bin:$PATH
fi

built=$(cd "$root" && cargo build --quiet --release -p llama-cpp-sys-2 --message-format=json |
    sed -n '/"build-script-executed"/s/.*llama-cpp-sys-2.*"out_dir":"\([^"]*\)".*/\1/p')
[[ -f $built/lib/libllama.so ]] || fail "cargo built llama-cpp-sys-2, but there is no libllama.so below '$built'"

stamp=$(cat "$0" "$root"/scripts/llama-source.sh "$root"/scripts/llama-tools/CMakeLists.txt <(echo "$built") | sha256sum)
current() {
    [[ $(cat "$out/stamp" 2> /dev/null) == "$stamp" ]] || return 1
    for p in "${programs[@]}"; do [[ -x $out/bin/$p ]] || return 1; done
}
if ! current; then
    src=$("$root/scripts/llama-source.sh")
    # The headers come from one tree and the libraries from the other: they must be the same code.
    crate=$(sed -n 's/^CMAKE_HOME_DIRECTORY:INTERNAL=//p' "$built/build/CMakeCache.txt")
    for part in include ggml/include common src vendor; do
        diff -rq "$crate/$part" "$src/$part" >&2 || fail "$part differs between the crate and the PyPI source; pin matching versions"
    done
    if grep -q CPPHTTPLIB_OPENSSL_SUPPORT "$built/build/common/CMakeFiles/llama-common.dir/flags.make"; then ssl=ON; else ssl=OFF; fi
    rm -f "$out/stamp"
    cmake -S "$root/scripts/llama-tools" -B "$out/build" -DLLAMA_SRC="$src" -DLLAMA_LIB="$built/lib" -DHTTP_SSL=$ssl \
        -DCMAKE_RUNTIME_OUTPUT_DIRECTORY="$out/bin" > "$out/cmake.log" || fail "cmake failed, see $out/cmake.log"
    cmake --build "$out/build" --parallel "${JOBS:-$(nproc)}" --target "${programs[@]}" > "$out/build.log" 2>&1 || {
        tail -n 30 "$out/build.log" >&2
        fail "the build failed, see $out/build.log"
    }
    echo "$stamp" > "$out/stamp"
fi
echo "$out/bin"
