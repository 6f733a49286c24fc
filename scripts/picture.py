#!/usr/bin/env python3
"""Draws docs/gain.svg, the README's picture, from the first table of docs/benchmarks.md.

Usage: picture.py     (in the root of the checkout; after a new measurement is in the table)
"""
import pathlib
import re

rows = []
for line in pathlib.Path("docs/benchmarks.md").read_text().splitlines():
    cells = [c.strip() for c in line.strip("|").split("|")]
    if len(cells) == 5 and re.match(r"(pp|tg)\d+ @", cells[0]):
        rows.append((cells[0], cells[1], float(cells[2].split()[0]), cells[3]))
    elif rows:
        break
names = {"pp": "reading the question", "tg": "answering"}
colours = {"dense": "#8b949e", "ceiling": "#d0d7de"}
out, y, scale = [], 34, 430 / max(r[2] for r in rows)
group = None
for test, mode, speed, gain in rows:
    if test != group:
        group, y = test, y + 22
        title = f"{names[test[:2]]} ({test})"
        out.append(f'<text x="12" y="{y}" font-weight="600">{title}</text>')
        y += 10
    width = speed * scale
    label = {"ceiling": "attention free"}.get(mode, mode)
    out.append(f'<text x="112" y="{y + 14}" text-anchor="end">{label}</text>')
    out.append(f'<rect x="120" y="{y}" width="{width:.0f}" height="19" fill="{colours.get(mode, "#1f883d")}"/>')
    out.append(f'<text x="{126 + width:.0f}" y="{y + 14}">{speed:.0f} t/s, {gain}</text>')
    y += 24
head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{y + 12}" viewBox="0 0 680 {y + 12}" '
        'font-family="sans-serif" font-size="13" fill="#1f2328"><rect width="100%" height="100%" fill="white"/>'
        '<text x="12" y="26" font-size="15" font-weight="600">SmolLM2-135M on 2 CPU cores, behind a fixed prompt of 6480 tokens</text>')
pathlib.Path("docs/gain.svg").write_text(head + "".join(out) + "</svg>\n")
