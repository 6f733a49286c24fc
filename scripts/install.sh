#!/usr/bin/env bash
# Installs what `make plugin` has built, in a tree that can be moved: no file in it names another by an absolute path.
#   bin/sqz                               finds its libraries and ggml's backends in lib/ggml-squeeze beside bin
#   lib/libggml-squeeze.so                the plugin (GGML_BACKEND_PATH), a link to the shared library
#   lib/libggml_squeeze.so*, .a           shared and static library, for C and C++
#   lib/ggml-squeeze/                     the llama.cpp that sqz runs
#   lib/pkgconfig, lib/cmake, include     what compilers need
#   share/man, share/*completion*, ...    man pages, completions of bash, zsh and fish
#   share/doc/ggml-squeeze                README, licence, docs
# Usage: install.sh PREFIX     DESTDIR is put in front of PREFIX, as packagers expect it.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
release=${CARGO_TARGET_DIR:-$root/target}/release
fail() { echo "install.sh: $*" >&2; exit 1; }
[[ $# == 1 && $1 == /* ]] || { echo "usage: install.sh PREFIX, an absolute path" >&2; exit 2; }
[[ $(uname -s) == Linux ]] || fail "only Linux is supported"
to=${DESTDIR:-}$1
for file in "$release"/{sqz,libggml_squeeze.so,libggml_squeeze.a}; do
    [[ -f $file ]] || fail "$file is missing: run make plugin"
done
header=$root/include/squeeze.h
[[ -f $header ]] || fail "$header is missing"
version=$(sed -n '/^\[workspace.package\]/,/^\[/ s/^version = "\(.*\)"/\1/p' "$root/Cargo.toml")
# As cargo-c numbers it: before 1.0 each minor version is another interface.
series=${version%%.*}
[[ $series != 0 ]] || series=$(cut -d. -f1,2 <<< "$version")
# What Rust's standard library needs, as `rustc --print native-static-libs` says.
static_libs=(gcc_s util rt pthread m dl c)

# The libraries that this very sqz was linked with, and the backends beside them.
patchelf=$("$root/scripts/patchelf.sh")
llama=$("$patchelf" --print-rpath "$release/sqz")
llama=${llama%%:*}
[[ -f $llama/libllama.so.0 && -d ${llama%/lib}/backends ]] || fail "$release/sqz was linked with libraries in '$llama', which are gone: run make plugin"

put() { # put MODE FILE TARGET: an ELF file comes without debug information
    install -D -m "$1" "$2" "$3"
    case $3 in *.so* | *.a | */bin/*) strip --strip-debug "$3" ;; esac
}
put 755 "$release/sqz" "$to/bin/sqz"
# DT_RPATH, not DT_RUNPATH: only the former serves libllama.so's own needs too.
"$patchelf" --force-rpath --set-rpath '$ORIGIN/../lib/ggml-squeeze' "$to/bin/sqz"
for name in libllama.so.0 libggml.so.0 libggml-base.so.0; do put 644 "$llama/$name" "$to/lib/ggml-squeeze/$name"; done
for file in "${llama%/lib}"/backends/libggml-*.so; do put 644 "$file" "$to/lib/ggml-squeeze/${file##*/}"; done

put 644 "$release/libggml_squeeze.so" "$to/lib/libggml_squeeze.so.$version"
"$patchelf" --set-soname "libggml_squeeze.so.$series" "$to/lib/libggml_squeeze.so.$version"
ln -sfn "libggml_squeeze.so.$version" "$to/lib/libggml_squeeze.so.$series"
ln -sfn "libggml_squeeze.so.$version" "$to/lib/libggml_squeeze.so"
# One file under both names: the loader then never maps a second copy, with a state of its own.
ln -sfn "libggml_squeeze.so.$version" "$to/lib/libggml-squeeze.so"
put 644 "$release/libggml_squeeze.a" "$to/lib/libggml_squeeze.a"
put 644 "$header" "$to/include/ggml-squeeze/squeeze.h"

fill() { # fill TEMPLATE TARGET
    mkdir -p "${2%/*}"
    sed -e "s/@VERSION@/$version/g" -e "s/@SOVERSION@/$series/g" -e "s/@SERIES@/${series//./\\\\\\\\.}/g" \
        -e "s/@STATIC_LIBS@/${static_libs[*]/#/-l}/" -e "s/@STATIC_LIST@/$(IFS=';'; echo "${static_libs[*]}")/" "$1" > "$2"
    if grep -n '@[A-Z_]*@' "$2" >&2; then fail "$1 has a placeholder that nothing fills"; fi
}
cmake=$to/lib/cmake/ggml-squeeze
fill "$root/packaging/ggml-squeeze.pc.in" "$to/lib/pkgconfig/ggml-squeeze.pc"
for name in ggml-squeeze-config.cmake ggml-squeeze-config-version.cmake; do fill "$root/packaging/$name.in" "$cmake/$name"; done
for name in link-llama.cmake register.c; do put 644 "$root/packaging/$name" "$cmake/$name"; done

"$to/bin/sqz" pages "$to/share"
doc=$to/share/doc/ggml-squeeze
for file in README.md LICENSE; do put 644 "$root/$file" "$doc/$file"; done
(cd "$root" && find docs -type f \( -name '*.md' -o -name '*.svg' \)) | while read -r file; do put 644 "$root/$file" "$doc/$file"; done
