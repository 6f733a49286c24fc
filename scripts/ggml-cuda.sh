#!/usr/bin/env bash
# Builds the CUDA backend of the pinned llama.cpp, unmodified, for one architecture (default 90a-real), and prints its folder
# (target/ggml-cuda/bin, which holds libggml-cuda.so). No GPU and no driver is needed. The CUDA toolkit is CUDA_HOME's or
# /usr/local/cuda's where it has cuBLAS, else the pinned packages from PyPI (1 GB). It takes an hour on 2 cores, 4 minutes on 16.
# Usage: ggml-cuda.sh [ARCHITECTURE]     JOBS=N limits the parallel compilations (default: all cores).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${CARGO_TARGET_DIR:-$root/target}/ggml-cuda
architecture=${1:-90a-real}
fail() { echo "ggml-cuda.sh: $*" >&2; exit 1; }

src=$("$root/scripts/llama-source.sh")
stamp=$(cat "$0" "$root/scripts/llama-source.sh" <(echo "$architecture") | sha256sum)
if [[ -f $out/bin/libggml-cuda.so && $(cat "$out/stamp" 2> /dev/null) == "$stamp" ]]; then
    echo "$out/bin"
    exit 0
fi
mkdir -p "$out"
if ! command -v cmake > /dev/null; then
    python3 -m pip install --quiet --disable-pip-version-check --target "$out/python" cmake==3.31.6 >&2
    export PATH=$out/python/cmake/data/bin:$PATH
fi
toolkit=
for folder in "${CUDA_HOME:-}" /usr/local/cuda; do
    [[ -x $folder/bin/nvcc && -f $folder/include/cublas_v2.h ]] && { toolkit=$folder; break; }
done
if [[ -z $toolkit ]]; then
    toolkit=$out/toolkit/nvidia/cu13
    if [[ ! -f $toolkit/include/cublas_v2.h ]]; then
        python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --target "$out/toolkit" \
            nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
            nvidia-cuda-cccl==13.0.85 nvidia-cublas==13.0.2.14 >&2
    fi
    # The packages hold what programs load, not what they are linked with: names without a version, and a driver to link to.
    (cd "$toolkit/lib" && for name in libcudart libcublas libcublasLt; do ln -sf "$name.so.13" "$name.so"; done)
    mkdir -p "$toolkit/lib/stubs"
    for name in MemCreate MemAddressReserve MemMap MemSetAccess MemRelease MemUnmap MemAddressFree MemGetAllocationGranularity \
        DeviceGet DeviceGetAttribute GetErrorString GetErrorName CtxGetCurrent; do
        echo "int cu$name(void) { return 999; }"
    done | gcc -shared -fPIC -x c - -Wl,-soname,libcuda.so.1 -o "$toolkit/lib/stubs/libcuda.so"
    [[ -e $toolkit/lib64 ]] || ln -s lib "$toolkit/lib64"
fi

# The source package leaves out a template that a build of ggml alone asks for; its content is not used.
tree=$out/source
rm -rf "$tree" && mkdir -p "$tree" && cp -a "$src/ggml/." "$tree/" && : > "$tree/ggml.pc.in"
cmake -S "$tree" -B "$out/build" -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=ON -DGGML_BACKEND_DL=ON -DBUILD_SHARED_LIBS=ON -DGGML_CPU=OFF \
    -DGGML_NATIVE=OFF -DGGML_CUDA_NCCL=OFF -DCMAKE_CUDA_ARCHITECTURES="$architecture" -DCUDAToolkit_ROOT="$toolkit" \
    -DCMAKE_CUDA_COMPILER="$toolkit/bin/nvcc" -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$out/bin" -DCMAKE_RUNTIME_OUTPUT_DIRECTORY="$out/bin" > "$out/cmake.log" 2>&1 || {
    tail -n 20 "$out/cmake.log" >&2
    fail "cmake failed, see $out/cmake.log"
}
cmake --build "$out/build" --parallel "${JOBS:-$(nproc)}" --target ggml-cuda > "$out/build.log" 2>&1 || {
    tail -n 30 "$out/build.log" >&2
    fail "the build failed, see $out/build.log"
}
find "$out" -name libggml-cuda.so -not -path "$out/bin/*" -exec cp {} "$out/bin/" \;
[[ -f $out/bin/libggml-cuda.so ]] || fail "the build ended without libggml-cuda.so below $out"
echo "$stamp" > "$out/stamp"
echo "$out/bin"
