#!/usr/bin/env bash
# Fuzzes with coverage guidance and AddressSanitizer, each target for so many seconds, from the seeds in fuzz/seeds/*.tar.gz and from what earlier
# runs have found (target/fuzz/corpus). A finding ends the script; its input is then below target/fuzz/artifacts.
# Usage: fuzz.sh SECONDS [TARGET ...]     targets: index_bytes index_fields c_abi attention; default: all
#        fuzz.sh smoke                    each target for 10 seconds from some of the seeds, in a build that is sooner made
#        fuzz.sh seeds                    replaces the seeds by a small choice of the corpus that reaches as much
#        fuzz.sh coverage                 what the corpus reaches, by file; needs a nightly compiler with llvm-tools
# The compiler is the stable one with its unstable options unlocked, so that no second one is needed.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=$(realpath -m "${CARGO_TARGET_DIR:-$root/target}")
work=$target/fuzz
version=0.13.2
all=(index_bytes index_fields c_abi attention)
usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ $# -gt 0 ]] || usage

tool=$("$root/scripts/tool.sh" cargo-fuzz "$version" cargo-fuzz)
export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$work/build SQZ_CUDA=0
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1}
cd "$root"

# The seeds of a target, in $work/seeds: those that runs have found and, in a folder of the target's name, those made by hand.
unpack() {
    rm -rf "$work/seeds/$1"
    mkdir -p "$work/seeds/$1"
    [[ ! -d $root/fuzz/seeds/$1 ]] || cp "$root/fuzz/seeds/$1"/* "$work/seeds/$1"
    [[ ! -f $root/fuzz/seeds/$1.tar.gz ]] || tar -C "$work/seeds/$1" -xzf "$root/fuzz/seeds/$1.tar.gz"
}

case $1 in
    seeds)
        mkdir -p "$root/fuzz/seeds"
        for name in "${all[@]}"; do
            mkdir -p "$work/corpus/$name"
            unpack "$name"
            rm -rf "$work/least"
            mkdir "$work/least"
            "$tool" run "$name" "$work/least" "$work/seeds/$name" "$work/corpus/$name" -- -merge=1 2> "$work/merge.log"
            # The smallest inputs, up to 60 KiB of them.
            find "$work/least" -type f -printf '%s %f\n' | sort -n | while read -r size file; do
                sum=$((${sum:-0} + size))
                [[ $sum -le 61440 ]] || break
                echo "$file"
            done > "$work/chosen"
            tar -C "$work/least" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -c -T "$work/chosen" |
                gzip -9n > "$root/fuzz/seeds/$name.tar.gz"
            echo "$name: $(wc -l < "$work/chosen") of $(find "$work/least" -type f | wc -l) inputs"
        done
        ;;
    coverage)
        export RUSTUP_TOOLCHAIN=nightly
        host=$(rustc -vV | sed -n 's/^host: //p')
        bin=$(rustc --print sysroot)/lib/rustlib/$host/bin
        [[ -x $bin/llvm-cov ]] || { echo "fuzz.sh: run 'rustup component add --toolchain nightly llvm-tools'" >&2; exit 1; }
        objects=()
        for name in "${all[@]}"; do
            mkdir -p "$work/corpus/$name"
            unpack "$name"
            "$tool" coverage "$name" "$work/seeds/$name" "$work/corpus/$name" > "$work/coverage.log" 2>&1 || {
                tail -n 20 "$work/coverage.log" >&2
                exit 1
            }
            # cargo-fuzz builds for coverage below target/, wherever the rest is built.
            objects+=(-object "$(find "$work/build" "$root/target" -path '*/coverage/*' -path '*/release/*' -name "$name" -type f | head -n 1)")
        done
        "$bin/llvm-profdata" merge -o "$work/all.profdata" "$root"/fuzz/coverage/*/coverage.profdata
        rm -rf "$root/fuzz/coverage"
        "$bin/llvm-cov" report -instr-profile "$work/all.profdata" "${objects[@]:1}" -sources "$root"/src/index "$root"/src/capi \
            "$root"/src/attention/cpu
        ;;
    *[!0-9]* | '') [[ $1 == smoke ]] || usage ;;&
    *)
        seconds=$1 profile=--release
        if [[ $1 == smoke ]]; then
            seconds=10 profile=--dev
            export CARGO_PROFILE_DEV_OPT_LEVEL=1
        fi
        shift
        [[ $# -gt 0 ]] || set -- "${all[@]}"
        for name in "$@"; do
            mkdir -p "$work/corpus/$name" "$work/artifacts/$name"
            unpack "$name"
            # Seeds run to their end, however long that takes: a call of the oracle takes up to half a minute. Those made by hand, whose
            # names are no hashes, come first.
            keep=60
            [[ $name != attention ]] || keep=8
            [[ $profile == --release ]] || find "$work/seeds/$name" -type f | sort -r | tail -n +$((keep + 1)) | xargs -r rm
            "$tool" build "$profile" "$name" 2> "$work/$name.build.log" || { tail -n 40 "$work/$name.build.log" >&2; exit 1; }
            # Inputs are small; an allocation far beyond them is a finding, and so is one that takes long.
            "$tool" run "$profile" "$name" "$work/corpus/$name" "$work/seeds/$name" -- -max_total_time="$seconds" -max_len=16384 \
                -rss_limit_mb=4096 -malloc_limit_mb=512 -timeout=60 -print_final_stats=1 \
                -artifact_prefix="$work/artifacts/$name/" > "$work/$name.log" 2>&1 || {
                grep -vE '^#[0-9]+\s' "$work/$name.log" | tail -n 60 >&2
                echo "fuzz.sh: $name has found something: see $work/artifacts/$name" >&2
                exit 1
            }
            count=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/$name.log")
            edges=$(sed -nE 's/.* cov: ([0-9]+) .*/\1/p' "$work/$name.log" | tail -n 1)
            echo "$name: $count inputs in $seconds s, $edges edges reached, nothing found"
        done
        ;;
esac
