#!/usr/bin/env bash
# Installs what building and testing needs on a Debian or Ubuntu machine; installs nothing that is there already.
set -euo pipefail
fail() { echo "setup.sh: $*" >&2; exit 1; }

command -v cargo > /dev/null || fail "cargo is missing. Install Rust 1.89 or later, from Debian ('apt-get install rustup' and\
 'rustup default stable') or as https://rustup.rs says; then run this again"
for component in fmt clippy; do
    cargo "$component" --version > /dev/null 2>&1 || fail "cargo $component is missing: run 'rustup component add rustfmt clippy'"
done

# bindgen needs the library and clang's own headers beside it.
has_libclang() {
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' > /dev/null && compgen -G '/usr/lib/llvm-*/lib/clang/*/include/stddef.h' > /dev/null
}
missing=()
need() { command -v "$1" > /dev/null || missing+=("$2"); }
need c++ g++
need make make
need cmake cmake
need pkg-config pkg-config
need unzip unzip
need git git
need python3 python3
need valgrind valgrind
python3 -m pip --version > /dev/null 2>&1 || missing+=(python3-pip)
has_libclang || missing+=(libclang-14-dev)
[[ -f /etc/ssl/certs/ca-certificates.crt ]] || missing+=(ca-certificates)
if [[ ${#missing[@]} -gt 0 ]]; then
    command -v apt-get > /dev/null || fail "please install: ${missing[*]}"
    sudo=()
    [[ $(id -u) == 0 ]] || sudo=(sudo)
    export DEBIAN_FRONTEND=noninteractive
    "${sudo[@]}" apt-get update -q
    # Releases without version 14 of libclang have another one under the general name.
    if [[ " ${missing[*]} " == *libclang-14-dev* ]] && ! apt-cache show libclang-14-dev > /dev/null 2>&1; then
        missing=("${missing[@]/libclang-14-dev/libclang-dev}")
    fi
    "${sudo[@]}" apt-get install -q -y --no-install-recommends "${missing[@]}"
fi
