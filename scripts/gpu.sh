#!/usr/bin/env bash
# Runs on a machine with a GPU, from an unpacked archive of scripts/pack.sh: checks, then speed, with a short table each.
# Usage: gpu.sh BIN STEP...    steps: tests, sanitize, conformance, ops (every op of llama.cpp's, on SQZ0 and on CUDA0), host=FILE:TEXT (a model
# with and without the plugin, with failing drivers, on several GPUs), shape=NAME@DEPTH (sqz random-model's shapes), model=FILE:TEXT:QUESTIONS,
# eval=FILE:COUNT:TOKENS (on the CPU, which such a machine has more of: 8 minutes at most, the results so far are in eval.*.jsonl)
# Logs go to $OUT (default .).
set -uo pipefail
[[ $# -ge 2 ]] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "$1" && pwd)
out=$(cd "${OUT:-.}" && pwd)
shift
export LD_LIBRARY_PATH=$bin SQZ_BACKENDS=$bin
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
failed=0

step() { # step NAME COMMAND...: output to a log, its end to the terminal
    local name=$1 start=$SECONDS
    shift
    if "$@" > "$out/$name.log" 2>&1; then echo "== $name: ok, $((SECONDS - start)) s"; else
        echo "== $name: FAILED, $((SECONDS - start)) s"
        failed=1
    fi
    grep -aE 'test result|FAILED|panicked|ERROR SUMMARY|^\||cases passed|error:|squeeze: ' "$out/$name.log" | tail -n 24
}

tests() {
    PROPTEST_CASES=${PROPTEST_CASES:-64} "$bin/test-cuda" --test-threads 12 && "$bin/test-kmeans_cuda" --test-threads 4 &&
        "$bin/test-op" --ignored --test-threads 1 gpu::
}
ops() {
    local device
    local -A passed
    for device in CUDA0 SQZ0; do
        GGML_BACKEND_PATH=$bin/libggml-squeeze.so GGML_SQUEEZE_DEVICES=1 "$bin/test-backend-ops" test -b "$device" -j "$(nproc)" > "$out/ops-$device.log" 2>&1
        passed[$device]=$(grep -aoE '[0-9]+/[0-9]+ tests passed' "$out/ops-$device.log")
        echo "| $device | ${passed[$device]} |"
    done
    [[ -n ${passed[SQZ0]} && ${passed[SQZ0]} == "${passed[CUDA0]}" ]]
}
pipelined() { # pipelined MODEL [VARIABLE=VALUE...]: contexts that llama.cpp makes for pipeline parallelism
    local model=$1
    shift
    env "$@" "$bin/llama-completion" -m "$model" -p hello -n 1 --temp 0 -no-cnv -ngl 99 -v 2>&1 | grep -c 'pipeline parallelism enabled'
}
host() { # host MODEL TEXT
    local name with without
    for name in selection gpu_host gpu_faults; do
        SQZ_MODEL=$1 SQZ_TEXT=$2 "$bin/test-$name" --ignored --nocapture --test-threads 1 || return 1
    done
    without=$(pipelined "$1")
    with=$(pipelined "$1" GGML_BACKEND_PATH="$bin/libggml-squeeze.so")
    echo "| pipeline parallelism on $(nvidia-smi -L | wc -l) GPUs: $without without the plugin, $with with it |"
    [[ $with == "$without" ]]
}
eval_on_cpu() { # eval_on_cpu FILE COUNT TOKENS
    timeout 480 "$root/scripts/eval-parts.sh" "$bin/sqz" $((($(nproc) + 3) / 4)) 4 "$out/eval.html" -m "$1" -dev none --count "$2" --tokens "$3" \
        --bytes 0.1,0.125,0.2,0.33,0.5 --baselines all --try all
}
sanitize() {
    local tool
    for tool in memcheck initcheck; do
        PROPTEST_CASES=3 compute-sanitizer --tool "$tool" "$bin/test-cuda" --test-threads 4
    done
}
shape() { # shape NAME DEPTH
    [[ -f $work/$1.gguf ]] || "$bin/sqz" random-model --shape "$1" -o "$work/$1.gguf"
    "$bin/sqz" bench -m "$work/$1.gguf" --synthetic-index -d "$2" -p 0 -n 64 -r 3 --budgets 0.1,0.2 --spread radius
}
model() { # model FILE TEXT QUESTIONS
    "$bin/sqz" build -m "$1" -f "$2" -o "$work/m.sqz.gguf" --state-file "$work/m.state" &&
        "$bin/sqz" eval -m "$1" --index "$work/m.sqz.gguf" --state-file "$work/m.state" --questions "$3" --budgets 0.1,0.2,1 --stepwise &&
        "$bin/sqz" bench -m "$1" --index "$work/m.sqz.gguf" --state-file "$work/m.state" -p 0 -n 128
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
for what in "$@"; do
    case $what in
        tests) step tests tests ;;
        sanitize) step sanitize sanitize ;;
        conformance)
            step conformance env SQZ_LLAMA_BIN="$bin" SQZ_PLUGIN="$bin/libggml-squeeze.so" SQZ_DEVICE=SQZ0 "$root/scripts/conformance.sh"
            ;;
        ops) step ops ops ;;
        host=*:*)
            IFS=: read -r file text <<< "${what#host=}"
            step host host "$file" "$text"
            ;;
        shape=*@*)
            IFS=@ read -r name depth <<< "${what#shape=}"
            step "$name-$depth" shape "$name" "$depth"
            ;;
        model=*:*:*)
            IFS=: read -r file text questions <<< "${what#model=}"
            step model model "$file" "$text" "$questions"
            ;;
        eval=*:*:*)
            IFS=: read -r file count tokens <<< "${what#eval=}"
            step eval eval_on_cpu "$file" "$count" "$tokens"
            ;;
        *) echo "gpu.sh: no step $what" >&2; failed=1 ;;
    esac
done
exit $failed
