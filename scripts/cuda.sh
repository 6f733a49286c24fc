#!/usr/bin/env bash
# Puts a pinned CUDA compiler from PyPI into target/cuda (140 MB, no driver and no GPU needed) and prints what CUDA_HOME is to
# be. A CUDA_HOME that has nvcc is taken as it is.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${CARGO_TARGET_DIR:-$root/target}/cuda
packages=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85)

if [[ -x ${CUDA_HOME:-}/bin/nvcc && $CUDA_HOME != "$out"/* ]]; then
    echo "$CUDA_HOME"
    exit 0
fi
if [[ $(cat "$out/packages" 2> /dev/null) != "${packages[*]}" ]]; then
    rm -rf "$out"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --target "$out" "${packages[@]}" >&2
    echo "${packages[*]}" > "$out/packages"
fi
echo "$out/nvidia/cu13"
