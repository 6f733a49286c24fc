#!/usr/bin/env bash
# Installs into a temporary folder, moves it, and uses everything from there: sqz, man pages, completions, pkg-config, CMake
# package, header, both libraries. Half a minute.
# Usage: check-install.sh     Needs make plugin.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
fail() { echo "check-install.sh: $*" >&2; exit 1; }
for name in $(compgen -e | grep -E '^(GGML|LLAMA|SQZ)_'); do unset "$name"; done
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
log=$tmp/log
quietly() { "$@" > "$log" 2>&1 || { tail -n 30 "$log" >&2; fail "'$*' failed"; } }

DESTDIR=$tmp/stage "$root/scripts/install.sh" /opt/squeeze
mkdir "$tmp/a folder"
mv "$tmp/stage/opt/squeeze" "$tmp/a folder/moved"
to="$tmp/a folder/moved"

# sqz runs from there, with its own libraries and backends.
quietly "$to/bin/sqz" -v info
grep -q "loaded CPU backend from $to/lib/ggml-squeeze/" "$log" || fail "sqz took its backends from elsewhere: $(grep loaded "$log")"
[[ $(ldd "$to/bin/sqz" | grep -cE "lib(llama|ggml)[^ ]* => $to/bin/../lib/ggml-squeeze/") == 3 ]] || fail "sqz took llama.cpp from elsewhere: $(ldd "$to/bin/sqz")"
grep -q "^plugin .*$to/lib/" "$log" || fail "sqz does not find the plugin: $(grep ^plugin "$log")"

# A page for every command that the help shows; completions that a shell can use.
commands=$("$to/bin/sqz" --help | sed -n '/^Commands:/,/^$/ s/^  \([a-z-]*\) .*/\1/p' | grep -v '^help$')
[[ $(wc -l <<< "$commands") -ge 8 ]] || fail "sqz --help lists too few commands: $commands"
for command in '' $commands; do
    page=$to/share/man/man1/sqz${command:+-$command}.1
    grep -q '^\.TH sqz' "$page" || fail "$page is missing or no man page"
done
completed=$(bash -euc 'source "$1"; COMP_WORDS=(sqz in) COMP_CWORD=1; _sqz sqz in sqz; echo "${COMPREPLY[*]}"' - "$to/share/bash-completion/completions/sqz")
[[ $completed == 'inspect info' ]] || fail "bash completes 'sqz in' to '$completed'"
for shell in 'zsh zsh/site-functions/_sqz' 'fish fish/vendor_completions.d/sqz.fish'; do
    read -r shell file <<< "$shell"
    grep -q inspect "$to/share/$file" || fail "$file does not know 'inspect'"
    if command -v "$shell" > /dev/null; then quietly "$shell" -n "$to/share/$file"; fi
done

# Programs link without ggml: the libraries look for it when they run.
readelf -d "$to/lib/libggml_squeeze.so" > "$log"
grep -q 'soname: \[libggml_squeeze\.so\.[0-9]' "$log" || fail "the library has no soname"
if grep -q PATH "$log"; then fail "the library has a search path"; fi

version=$(PKG_CONFIG_PATH=$to/lib/pkgconfig pkg-config --modversion ggml-squeeze)
run() { # run PROGRAM: it ends well, and says that there is no ggml
    quietly env LD_LIBRARY_PATH="$to/lib" "$1"
    grep -q "^version $version, status [0-9]*: .*ggml" "$log" || fail "$1 printed: $(cat "$log")"
}
cd "$tmp"
export PKG_CONFIG_PATH=$to/lib/pkgconfig
eval "cflags=($(pkg-config --cflags ggml-squeeze)) libs=($(pkg-config --libs ggml-squeeze)) all=($(pkg-config --static --libs ggml-squeeze))"
quietly cc -Wall -Wextra -Werror "${cflags[@]}" "$root/tests/install/use.c" "${libs[@]}" -o use-shared
run ./use-shared
quietly cc -Wall -Wextra -Werror "${cflags[@]}" "$root/tests/install/use.c" "${all[@]/#-lggml_squeeze/-l:libggml_squeeze.a}" -o use-static
[[ -z $(readelf -d use-static | grep NEEDED.*squeeze || true) ]] || fail "use-static is not static"
run ./use-static

quietly cmake -S "$root/tests/install" -B build -DCMAKE_PREFIX_PATH="$to"
quietly cmake --build build
for program in build/use-{,cpp-}{shared,static}; do run "$program"; done
echo "check-install.sh: sqz, man pages, completions, pkg-config, CMake package and both libraries work from a moved folder"
