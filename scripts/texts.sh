#!/usr/bin/env bash
# Writes two real texts into a folder: prose.txt (the help topics of CPython's own documentation) and code.txt (modules of
# its standard library, in a fixed order). The same Python gives the same bytes.
# Usage: texts.sh DIR
set -euo pipefail
[[ $# == 1 ]] || { echo "usage: texts.sh DIR" >&2; exit 2; }
mkdir -p "$1"
python3 - "$1" << 'EOF'
import pathlib, sys, sysconfig
from pydoc_data.topics import topics

out = pathlib.Path(sys.argv[1])
# The longest topics are about the language itself; the many small ones repeat parts of them.
order = ["datamodel", "compound", "simple", "expressions", "import", "executionmodel", "strings", "typesseq", "typesmapping"]
order = [t for t in order if t in topics] + sorted(set(topics) - set(order))
prose = "\n\n".join(topics[t].strip() for t in order) + "\n"
# Rulers of stars and equal signs tell a reader nothing and cost tokens.
lines = [l.rstrip() for l in prose.splitlines() if not l.strip() or set(l.strip()) - set("*=-~^\"")]
(out / "prose.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

modules = ["functools", "heapq", "bisect", "textwrap", "queue", "shlex", "csv", "contextlib", "dataclasses", "argparse", "ast"]
stdlib = pathlib.Path(sysconfig.get_path("stdlib"))
code = "".join(f"# {m}.py\n" + (stdlib / f"{m}.py").read_text(encoding="utf-8").rstrip() + "\n\n\n" for m in modules)
(out / "code.txt").write_text(code, encoding="utf-8")
EOF
