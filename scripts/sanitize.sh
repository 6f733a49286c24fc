#!/usr/bin/env bash
# Runs tests under tools that watch memory and threads. Usage: sanitize.sh STEP ...
#   address   the library's tests under AddressSanitizer, and the plugin, built with it, in llama-server
#   thread    what shares anything between threads, under ThreadSanitizer; needs the component rust-src
#   miri      index views, the C ABI and the scalar attention path under Miri; needs a nightly compiler with Miri
#   valgrind  the plugin of the release build in llama-server under memcheck (10 minutes)
# address and thread take the stable compiler with its unstable options unlocked. The plugin's steps need scripts/llama.sh,
# scripts/models.sh and `make plugin`.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=$(realpath -m "${CARGO_TARGET_DIR:-$root/target}")
work=$target/sanitize
host=$(rustc -vV | sed -n 's/^host: //p')
models=${SQZ_MODELS:-$target/models}
llama=${SQZ_LLAMA_BIN:-$target/llama/bin}
fail() { echo "sanitize.sh: $*" >&2; exit 1; }
[[ $# -gt 0 ]] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$work"
cd "$root"
export SQZ_CUDA=0 PROPTEST_CASES=${PROPTEST_CASES:-24}
# Instrumented vector code takes the optimiser many minutes.
export CARGO_PROFILE_RELEASE_OPT_LEVEL=1

# An index of a short text, made by the release build; and a prompt that begins with it.
fixture() {
    head -c 800 cli/tests/common/text.txt > "$work/prefix.txt"
    { cat "$work/prefix.txt"; printf '\nIn short,'; } > "$work/prompt.txt"
    "$target/release/sqz" build -m "$models/smollm2-135m.gguf" -f "$work/prefix.txt" -o "$work/prefix.sqz.gguf" 2> "$work/build.log" ||
        { tail -n 5 "$work/build.log" >&2; fail "no index could be built"; }
}

# host_run PLUGIN COMMAND...: llama-server with the plugin, two slots, three requests and an orderly end; it must have been sparse.
host_run() {
    local plugin=$1 port server status=0
    shift
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    env GGML_BACKEND_PATH="$plugin" GGML_SQUEEZE_INDEX="$work/prefix.sqz.gguf" GGML_SQUEEZE_MIN_PREFIX=0 GGML_SQUEEZE_LOG=1 "$@" \
        "$llama/llama-server" -m "$models/smollm2-135m.gguf" --host 127.0.0.1 --port "$port" -t 2 -np 2 -c 1024 -fit off --no-ui \
        --no-warmup > "$work/host.log" 2>&1 &
    server=$!
    python3 - "$port" "$work/prompt.txt" "$server" << 'EOF' || status=$?
import json, os, sys, time, urllib.request
port, prompt, server = sys.argv[1], open(sys.argv[2], encoding="utf-8").read(), int(sys.argv[3])
def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=1800).read())
for _ in range(3000):
    os.kill(server, 0)
    try:
        call("/health")
        break
    except OSError:
        time.sleep(0.2)
for slot, text in [(0, prompt), (1, "Another text."), (1, prompt)]:
    reply = call("/completion", {"prompt": text, "n_predict": 6, "temperature": 0, "id_slot": slot, "ignore_eos": True})
    assert reply["content"], reply
EOF
    kill -TERM "$server" 2> /dev/null || true
    wait "$server" || status=$?
    [[ $status == 0 ]] || { tail -n 60 "$work/host.log" >&2; fail "the host failed"; }
    grep 'squeeze: totals' "$work/host.log" | grep -v 'sparse 0 nodes' || fail "the plugin was not used: see $work/host.log"
}

address() {
    local flags=(--target "$host" --target-dir "$work/address" -p ggml-squeeze)
    RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" cargo test --quiet --release "${flags[@]}" --lib --test attention
    # The plugin takes the sanitiser's functions from the process: the C compiler's library, loaded first.
    RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" cargo build --quiet --release "${flags[@]}"
    fixture
    # What llama.cpp and OpenMP leave at exit is not ours to report; leaks of the library are valgrind's and fuzz.sh's part.
    host_run "$work/address/$host/release/libggml_squeeze.so" LD_PRELOAD="$(${CC:-cc} -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0
    echo "AddressSanitizer: nothing found"
}

thread() {
    [[ -d $(rustc --print sysroot)/lib/rustlib/src/rust ]] || rustup component add rust-src
    RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=thread" TSAN_OPTIONS=halt_on_error=1 \
        cargo test --quiet --release -Zbuild-std --target "$host" --target-dir "$work/thread" -p ggml-squeeze --lib --test attention \
        --test threads
    echo "ThreadSanitizer: nothing found"
}

miri() {
    cargo +nightly miri --version > /dev/null 2>&1 || fail "Miri is missing: rustup component add --toolchain nightly miri rust-src"
    MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-deterministic-floats" cargo +nightly miri test --quiet --target-dir "$work/miri" -p ggml-squeeze --test miri
    echo "Miri: nothing found"
}

valgrind() {
    fixture
    # The tool knows no AVX-512: ggml and the plugin choose AVX2 there.
    host_run "$target/release/libggml-squeeze.so" valgrind --quiet --error-exitcode=9 --suppressions="$root/scripts/valgrind.supp" \
        --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite
    echo "valgrind: nothing found"
}

for step in "$@"; do
    case $step in address | thread | miri | valgrind) "$step" ;; *) fail "unknown step '$step'" ;; esac
done
