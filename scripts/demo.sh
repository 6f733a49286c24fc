#!/usr/bin/env bash
# The whole thing on a small real model: plants 14 facts into a real text of about 6500 tokens, indexes it, and asks for
# every fact with an unmodified llama-completion, without and with the plugin. Prints answers and speeds side by side.
# `make demo` builds what this needs (sqz, plugin, llama.cpp's programs). The first run processes the text once; its index
# and state stay in target/demo, keyed by what they were made from.
# SQZ_MODELS, SQZ_LLAMA_BIN: other folders for model and programs. BUDGET: share of the prefix keys (0.2). THREADS: 2.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
sqz=$target/release/sqz
plugin=$target/release/libggml-squeeze.so
completion=${SQZ_LLAMA_BIN:-$target/llama/bin}/llama-completion
for file in "$sqz" "$plugin" "$completion"; do
    [[ -f $file ]] || { echo "demo.sh: $file is missing: run 'make demo'" >&2; exit 1; }
done
threads=${THREADS:-$(nproc)}
# Settings of the caller's own experiments must not reach the dense runs.
for name in $(compgen -e | grep -E '^(GGML|LLAMA)_'); do unset "$name"; done

model=$("$root/scripts/models.sh" "${SQZ_MODELS:-$target/models}" smollm2)
texts=$target/demo/texts
"$root/scripts/texts.sh" "$texts"
key=$(cat "$texts/prose.txt" "$model" "$sqz" "$0" | sha256sum | cut -c1-16)
dir=$target/demo/$key
if [[ ! -f $dir/complete ]]; then
    rm -rf "$dir"
    mkdir -p "$dir"
    "$sqz" facts -m "$model" -f "$texts/prose.txt" --tokens 6500 --seed 1 -o "$dir/text.txt" --questions "$dir/questions.jsonl"
    "$sqz" build -m "$model" -f "$dir/text.txt" -t "$threads" -o "$dir/text.sqz.gguf" --state-file "$dir/text.state"
    touch "$dir/complete"
fi

exec python3 - "$completion" "$plugin" "$model" "$dir" "$threads" "${BUDGET:-0.2}" << 'EOF'
import json, os, pathlib, re, statistics, subprocess, sys, tempfile, textwrap

completion, plugin, model, folder, threads, budget = sys.argv[1:]
folder = pathlib.Path(folder)
text = (folder / "text.txt").read_text(encoding="utf-8")
questions = [json.loads(l) for l in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
facts = [q for q in questions if q["kind"] == "fact"]
sparse_env = {
    "GGML_BACKEND_PATH": plugin,
    "GGML_SQUEEZE_INDEX": str(folder / "text.sqz.gguf"),
    "GGML_SQUEEZE_BUDGET": budget,
    "GGML_SQUEEZE_LOG": "1",
}


def ask(prompt_file, env):
    """Answer, tokens per second of generation, and llama.cpp's and the plugin's messages."""
    command = [completion, "-m", model, "-f", prompt_file, "--prompt-cache", str(folder / "text.state"), "--prompt-cache-ro",
               "--temp", "0", "-n", "20", "-no-cnv", "--no-display-prompt", "-c", "8192", "-t", threads]
    run = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, errors="replace")
    log = run.stderr
    if run.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{log[-3000:]}")
    speed = [m.group(1) for m in re.finditer(r"(?<!prompt )eval time =.*?([0-9.]+) tokens per second", log)]
    if not speed:
        sys.exit(f"llama-completion printed no speed:\n{log[-3000:]}")
    return run.stdout, float(speed[-1]), log


def first(answer):
    """The answer up to its first full stop or line end."""
    return re.split(r"[.\n]", answer.strip(), maxsplit=1)[0]


print(f"\n{len(facts)} facts in {folder / 'text.txt'}, asked with {pathlib.Path(completion).name}; budget {budget} (+ right, - wrong)\n")
print(f"| {'fact':<42} | {'planted':<10} | {'dense answer':<14} | {'t/s':>6} | {'sparse answer':<14} | {'t/s':>6} |")
print(f"|{'-' * 44}|{'-' * 12}|{'-' * 16}|{'-' * 7}:|{'-' * 16}|{'-' * 7}:|")
right, speeds, sparse_nodes, kept = [0, 0], [[], []], 0, []
for q in facts:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as prompt:
        # llama-completion drops one line end at the end of a prompt file; the questions have none.
        prompt.write(text + q["prompt"])
        prompt.flush()
        cells = []
        for i, env in enumerate([{}, sparse_env]):
            answer, speed, log = ask(prompt.name, env)
            ok = answer.strip().startswith(q["answer"])
            right[i] += ok
            speeds[i].append(speed)
            cells += [("+ " if ok else "- ") + first(answer)[:12], speed]
            if i == 1:
                totals = re.findall(r"sparse (\d+) nodes(?: \(kept share ([0-9.]+)\))?", log)
                sparse_nodes += int(totals[-1][0]) if totals else 0
                kept += [float(totals[-1][1])] if totals and totals[-1][1] else []
    name = textwrap.shorten(q["prompt"], 42, placeholder=" ...")
    print(f"| {name:<42} | {q['answer']:<10} | {cells[0]:<14} | {cells[1]:>6.2f} | {cells[2]:<14} | {cells[3]:>6.2f} |", flush=True)

if not sparse_nodes:
    sys.exit("\nthe plugin did not use the index: nothing was sparse. Its messages:\n" +
             "\n".join(l for l in log.splitlines() if "squeeze" in l))
dense, sparse = map(statistics.median, speeds)
gain = statistics.median(b / a for a, b in zip(*speeds))
print(f"\ndense {right[0]} of {len(facts)} facts at {dense:.1f} t/s; sparse {right[1]} of {len(facts)} facts at {sparse:.1f} t/s: "
      f"{gain:.2f} times as fast with {100 * statistics.mean(kept or [0]):.0f} % of the prefix read (medians)")
EOF
