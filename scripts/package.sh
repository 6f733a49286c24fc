#!/usr/bin/env bash
# Packages what `make release` has built: a tar.gz that runs from any folder, a .deb for /usr, and SHA256SUMS, in target/package.
# The same build packed again gives the same bytes. The licence texts of all dependencies go in, collected by a pinned
# cargo-about.
# Usage: package.sh     Without dpkg-dev there is no .deb.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
out=$target/package
about=0.9.3
fail() { echo "package.sh: $*" >&2; exit 1; }

tool=$("$root/scripts/tool.sh" cargo-about "$about" cargo-about --features cli)

version=$(sed -n '/^\[workspace.package\]/,/^\[/ s/^version = "\(.*\)"/\1/p' "$root/Cargo.toml")
name=ggml-squeeze-$version-linux-$(uname -m)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
umask 022
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
DESTDIR=$tmp "$root/scripts/install.sh" "/$name"

doc=$tmp/$name/share/doc/ggml-squeeze
(cd "$root" && "$tool" generate --frozen --workspace --fail -c packaging/about.toml -o "$doc/LICENSES-crates.txt" packaging/about.hbs)
[[ $(grep -c '^---' "$doc/LICENSES-crates.txt") -ge 10 ]] || fail "cargo-about found too few licences"
install -m 644 "$("$root/scripts/llama-source.sh")/LICENSE" "$doc/LICENSE-llama.cpp"
# The fonts that sqz draws with are under another licence than the crate that has them.
crate=$(cd "$root" && cargo metadata --format-version 1 --frozen |
    python3 -c 'import json, sys; print(*[p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"] == "dejavu"])')
install -m 644 "${crate%/*}"/assets/dejavu-fonts-*/LICENSE "$doc/LICENSE-dejavu-fonts"
std=$(rustc --print sysroot)/share/doc/rust/COPYRIGHT-library.html
[[ -f $std ]] || fail "$std, the licences of Rust's standard library, is missing: build with a toolchain of rustup"
install -m 644 "$std" "$doc/LICENSES-rust-std.html"

rm -rf "$out"
mkdir -p "$out"
tar c -C "$tmp" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" "$name" | gzip -n -9 > "$out/$name.tar.gz"

if command -v dpkg-deb dpkg-shlibdeps > /dev/null; then
    deb=$tmp/deb
    mkdir -p "$deb/DEBIAN" "$tmp/shlibs/debian"
    cp -a "$tmp/$name" "$deb/usr"
    gzip -n -9 "$deb"/usr/share/man/man1/*.1
    mkdir "$deb/usr/share/zsh/vendor-completions"
    mv "$deb/usr/share/zsh/site-functions/_sqz" "$deb/usr/share/zsh/vendor-completions/"
    rmdir "$deb/usr/share/zsh/site-functions"
    {
        echo "ggml-squeeze is under the licence below. The programs and libraries also hold llama.cpp (LICENSE-llama.cpp), Rust crates"
        echo "(LICENSES-crates.txt), Rust's standard library (LICENSES-rust-std.html) and fonts (LICENSE-dejavu-fonts); all in this folder."
        echo
        cat "$root/LICENSE"
    } > "$deb/usr/share/doc/ggml-squeeze/copyright"
    # Which packages have the system libraries that ours need.
    printf 'Source: ggml-squeeze\n\nPackage: ggml-squeeze\nArchitecture: any\n' > "$tmp/shlibs/debian/control"
    depends=$(cd "$tmp/shlibs" && dpkg-shlibdeps -O --ignore-missing-info "-l$deb/usr/lib/ggml-squeeze" -e "$deb/usr/bin/sqz" \
        "$deb"/usr/lib/libggml_squeeze.so.*.*.* "$deb"/usr/lib/ggml-squeeze/*.so* 2> "$tmp/shlibs/log") || { cat "$tmp/shlibs/log" >&2; fail "dpkg-shlibdeps failed"; }
    arch=$(dpkg --print-architecture)
    cat > "$deb/DEBIAN/control" << CONTROL
Package: ggml-squeeze
Version: $version
Architecture: $arch
Maintainer: $(git -C "$root" log -1 --format='%an <%ae>')
Installed-Size: $(du -sk --apparent-size "$deb/usr" | cut -f1)
Depends: ${depends#shlibs:Depends=}
Section: science
Priority: optional
Description: Squeezed Attention as a ggml backend plugin for llama.cpp
 Indexes the keys of a long, fixed prompt prefix once; at inference each query
 attends only to the keys that matter. Holds the plugin, the program sqz, and
 header and libraries for C and C++.
CONTROL
    echo 'activate-noawait ldconfig' > "$deb/DEBIAN/triggers"
    dpkg-deb --build --root-owner-group "$deb" "$out/ggml-squeeze_${version}_$arch.deb" > "$tmp/dpkg.log" || { cat "$tmp/dpkg.log" >&2; fail "dpkg-deb failed"; }
else
    echo "package.sh: no .deb: dpkg-deb or dpkg-shlibdeps is missing (Debian package dpkg-dev)" >&2
fi
(cd "$out" && sha256sum -- * > "$tmp/sums" && mv "$tmp/sums" SHA256SUMS)
ls -l "$out"
