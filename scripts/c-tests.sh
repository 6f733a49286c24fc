#!/usr/bin/env bash
# The C ABI from C and C++: the header under strict compilers, tests/c under valgrind and the sanitisers, the examples on a real
# model, and what the plugin exports. Needs the release build, llama.cpp (scripts/llama.sh) and SmolLM2 (scripts/models.sh).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
release=$target/release
models=${SQZ_MODELS:-$target/models}
fail() { echo "c-tests.sh: $*" >&2; exit 1; }
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
strict=(-Wall -Wextra -Werror -pedantic -I"$root/include")

"$root/scripts/header.sh" --check
printf '#include "squeeze.h"\n#include "squeeze.h"\nint main(void) { return sqz_abi_version() == SQZ_ABI_VERSION ? 0 : 1; }\n' > "$tmp/header.c"
cp "$tmp/header.c" "$tmp/header.cpp"
${CC:-cc} -std=c99 "${strict[@]}" -c "$tmp/header.c" -o "$tmp/header.o"
${CXX:-c++} -std=c++11 "${strict[@]}" -c "$tmp/header.cpp" -o "$tmp/header.o"

# Exactly the functions of the header, and the plugin's entry point.
{ grep -oE '\bsqz_[a-z_]+\(' "$root/include/squeeze.h" | tr -d '('; echo ggml_backend_init; } | sort -u > "$tmp/documented"
nm -D --defined-only "$release/libggml_squeeze.so" | awk '{ print $3 }' | sort -u > "$tmp/exported"
diff "$tmp/documented" "$tmp/exported" >&2 || fail "the plugin exports other names than the header declares"

libs=("$release/libggml_squeeze.a" -lm -ldl -lpthread)
[[ $(uname) != Linux ]] || libs+=(-lgcc_s -lutil -lrt)
test=("${CC:-cc}" -std=c99 "${strict[@]}" -g -O1 "$root/tests/c/abi.c")
"${test[@]}" -o "$tmp/abi" "${libs[@]}"
"$tmp/abi" "$tmp"
"${test[@]}" -fsanitize=address,undefined -fno-sanitize-recover=all -o "$tmp/abi-asan" "${libs[@]}"
"$tmp/abi-asan" "$tmp"
# Workers of a thread pool may still be on their way out when the process ends: their stacks count as possibly lost.
valgrind --quiet --error-exitcode=1 --leak-check=full --show-leak-kinds=definite,indirect --errors-for-leak-kinds=definite,indirect \
    "$tmp/abi" "$tmp"

"${CC:-cc}" -std=c99 "${strict[@]}" -O2 "$root/examples/c/attend.c" -o "$tmp/attend" "${libs[@]}"
"$tmp/attend" || fail "examples/c/attend.c failed"

src=$("$root/scripts/llama-source.sh")
built=$(ls -d "$release"/build/llama-cpp-sys-2-*/out | while read -r out; do if [[ -f $out/lib/libllama.so ]]; then echo "$out"; fi; done | head -n 1)
[[ -n $built ]] || fail "llama.cpp is not built: run scripts/llama.sh"
# An old-style rpath: it serves the libraries' own dependencies too, which carry none.
llama=(-I"$src/include" -I"$src/ggml/include" -I"$root/include" -L"$built/lib" -Wl,-rpath,"$built/lib"
    -Wl,--disable-new-dtags)
for example in ggml_graph llama_host; do
    "${CXX:-c++}" -std=c++17 -Wall -Wextra -Werror -O2 "$root/examples/cpp/$example.cpp" -o "$tmp/$example" "${llama[@]}" \
        "${libs[@]}" -lllama -lggml -lggml-base
done
"$tmp/ggml_graph" "$built/build/bin" 2> "$tmp/log" || {
    tail -n 20 "$tmp/log" >&2
    fail "examples/cpp/ggml_graph.cpp failed"
}
head -c 6000 "$root/docs/server.md" > "$tmp/text.txt"
"$tmp/llama_host" "$models/smollm2-135m.gguf" "$tmp/text.txt" $'\nIn one sentence, this text is about' "$tmp/kept.sqz.gguf" \
    "$built/build/bin" 2> "$tmp/log" || {
    tail -n 20 "$tmp/log" >&2
    fail "the llama.cpp host failed"
}
"$release/sqz" inspect "$tmp/kept.sqz.gguf" --verify -m "$models/smollm2-135m.gguf" > "$tmp/log" 2>&1 || {
    cat "$tmp/log" >&2
    fail "the index of the llama.cpp host does not fit its model"
}

"${CC:-cc}" -std=c99 -Wall -Wextra -Werror "$root/tests/c/private_host.c" -o "$tmp/private_host" -ldl
LD_LIBRARY_PATH=$built/lib "$tmp/private_host" "$built/lib/libllama.so" "$built/build/bin" "$release/libggml-squeeze.so" 2> "$tmp/log" || {
    cat "$tmp/log" >&2
    fail "the plugin does not find a ggml that its host loaded for itself alone"
}
echo "a ggml loaded for its host alone is found"
