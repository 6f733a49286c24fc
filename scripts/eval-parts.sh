#!/usr/bin/env bash
# `sqz eval` in N processes of T threads, for machines with more cores than one process can use: the prefix is computed and indexed once, each
# process measures a part of the questions, and a last run puts the results together. The same command goes on where it was stopped.
# Usage: eval-parts.sh SQZ N T REPORT.html ARGS...     ARGS: those of sqz eval, but for -o, -t and --part
set -euo pipefail
[[ $# -gt 4 && $4 == *.html ]] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
sqz=$1 n=$2 threads=$3 report=$4
shift 4
base=${report%.html}

if [[ ! -d $base.1.work ]]; then
    "$sqz" eval "$@" -t $((n * threads)) -o "$base.0.html" --part "1/$n" --minutes 0 > /dev/null
    for i in $(seq "$n"); do cp -r "$base.0.work" "$base.$i.work" && cp "$base.0.jsonl" "$base.$i.jsonl"; done
fi
for i in $(seq "$n"); do
    "$sqz" eval "$@" -t "$threads" -o "$base.$i.html" --part "$i/$n" > "$base.$i.log" 2>&1 &
done
failed=0
for job in $(jobs -p); do wait "$job" || failed=1; done
[[ $failed == 0 ]] || { echo "eval-parts.sh: a part failed: see $base.*.log" >&2; exit 1; }
cat "$base".[0-9]*.jsonl > "$base.jsonl"
exec "$sqz" eval "$@" -t "$threads" -o "$report" --each
