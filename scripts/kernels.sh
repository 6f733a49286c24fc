#!/usr/bin/env bash
# Registers and spilled bytes of every CUDA kernel of the last release build, from the compiler's own report.
# Usage: kernels.sh     Fails if there are no kernels, or if one that every call runs spills more than 128 bytes per thread.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
log=$(ls -t "$target"/release/build/ggml-squeeze-*/out/ptxas.log 2> /dev/null | head -n 1)
[[ -n $log ]] || { echo "kernels.sh: no build with CUDA kernels below $target: run scripts/cuda.sh and build with its CUDA_HOME" >&2; exit 1; }
awk '
    /Compiling entry function/ { split($0, part, "\047"); name = part[2]; arch = part[4] }
    /bytes spill stores/ { for (i = 1; i <= NF; i++) if ($i == "spill" && $(i + 1) ~ /^stores/) spill = $(i - 2) }
    /Used [0-9]+ registers/ {
        for (i = 1; i <= NF; i++) { if ($i == "Used") registers = $(i + 1); if ($i == "smem" || $i == "smem,") shared = $(i - 2) }
        printf "%-26s %-8s %4d registers %6d bytes spilled %6d bytes shared\n", name, arch, registers, spill, shared
        kernels++
        # Those for more than 8K clusters, by mass, and the attend of a prefill at head sizes 80 to 128 hold more than a
        # thread has registers for.
        if (spill > 128 && name !~ /^select_(alone_|opened_|coarse_|tile_)?(16|32|64)|_mass$|^prefill_attend_(80_80|96_96|112_112|128_128)$/) { bad = bad " " name }
        shared = 0
    }
    END {
        if (!kernels) { print "kernels.sh: the report names no kernel" > "/dev/stderr"; exit 1 }
        if (bad) { print "kernels.sh: these spill:" bad > "/dev/stderr"; exit 1 }
    }' "$log" | sort
