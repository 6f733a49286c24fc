#!/usr/bin/env bash
# llama.cpp's own op test (test-backend-ops) for FLASH_ATTN_EXT on a device of the plugin, against stock ggml: once with
# every supported node forced through our kernels, once with nothing to accelerate (all calls must reach stock ggml unharmed).
# Usage: conformance.sh [--all]     --all: every case (about 10 minutes a run) instead of those in `cases`
# Needs scripts/llama.sh and target/release/libggml-squeeze.so. SQZ_LLAMA_BIN: folder of the llama.cpp programs. SQZ_PLUGIN: the plugin.
# SQZ_DEVICE: SQZ-CPU, or SQZ0 for the first GPU (its backend, libggml-cuda.so, in the folder of the programs).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
test=${SQZ_LLAMA_BIN:-$target/llama/bin}/test-backend-ops
plugin=${SQZ_PLUGIN:-$target/release/libggml-squeeze.so}
device=${SQZ_DEVICE:-SQZ-CPU}
fail() { echo "conformance.sh: $*" >&2; exit 1; }
[[ -x $test ]] || fail "$test is missing; run scripts/llama.sh"
[[ -f $plugin ]] || fail "$plugin is missing; run make plugin"

# Every F16 case of a head size that our kernels take; of other types and head sizes, which must go to stock ggml, a few.
cases='hsk=(64|72|80|96|128|192|256),.*type_K=f16,type_V=f16'
cases+='|kv=113,nb=3,.*type_K=(f32|bf16|q8_0|q4_0)|hsk=(40|65|320|576),.*kv=113,nb=3,'
forced_at_least=500
if [[ $device != SQZ-CPU ]]; then
    # A GPU has the time for those of quantised and BF16 caches too, each with and without ALiBi. Of 72 elements the quantised ones are
    # rows of 96.
    cases='hsk=(64|72|80|96|112|128|192|256),.*type_K=(f16|bf16|q8_0|q4_0),type_V=(f16|bf16|q8_0|q4_0)'
    cases+='|hsk=(64|72),.*kv=113,nb=3,.*type_K=(f32|q4_1|q5_0|q5_1|iq4_nl)|hsk=(40|65|320|512|576),.*kv=113,nb=3,'
    forced_at_least=2000
fi
filter=(-p "$cases")
[[ ${1:-} == --all ]] && filter=()

tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
run() { # run NAME [VARIABLE=VALUE...]
    local name=$1 status=0
    shift
    env -u GGML_SQUEEZE_INDEX GGML_BACKEND_PATH="$plugin" GGML_SQUEEZE_DEVICES=1 "$@" \
        "$test" test -b "$device" -o FLASH_ATTN_EXT "${filter[@]}" > "$tmp/$name.out" 2> "$tmp/$name.err" || status=$?
    if [[ $status != 0 ]]; then
        grep -a 'FAIL' "$tmp/$name.out" | head -n 20 >&2 || true
        tail -n 5 "$tmp/$name.err" >&2
        fail "$name: test-backend-ops ended with $status"
    fi
    # A device that is not there, or a filter that matches nothing, also ends with 0.
    passed=$(sed -nE 's/.* ([0-9]+)\/\1 tests passed.*/\1/p' "$tmp/$name.out")
    [[ ${passed:-0} -ge $forced_at_least ]] || fail "$name: ${passed:-0} cases ran on $device, expected at least $forced_at_least"
}

run forced GGML_SQUEEZE_FORCE=1 GGML_SQUEEZE_LOG=1
forced=$(sed -nE 's/.*squeeze: totals: forced ([0-9]+) nodes.*/\1/p' "$tmp/forced.err" | tail -n 1)
[[ ${forced:-0} -ge $forced_at_least ]] || fail "only ${forced:-0} nodes went through our kernels, expected at least $forced_at_least"
echo "forced: $passed cases passed, $forced nodes through our kernels"
run stock
echo "stock: $passed cases passed"
