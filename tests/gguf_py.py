"""Opens an index with gguf-py and compares what it reads with what was written.

usage: gguf_py.py INDEX EXPECTED
EXPECTED: a folder with one raw little-endian file per array: key.<name> or tensor.<name>, and shapes.txt with a line
`name type dimensions...` per tensor, in file order, innermost dimension first.
"""

import pathlib
import sys

from gguf import GGUFReader


def main(index: str, expected: str) -> None:
    reader = GGUFReader(index)
    folder = pathlib.Path(expected)

    shapes = [f"{t.name} {t.tensor_type.name} {' '.join(str(int(n)) for n in t.shape)}" for t in reader.tensors]
    assert shapes == (folder / "shapes.txt").read_text().splitlines(), shapes

    compared = 0
    for path in sorted(folder.iterdir()):
        kind, _, name = path.name.partition(".")
        if kind == "key":
            field = reader.fields[name]
            found = b"".join(field.parts[i].tobytes() for i in field.data)
        elif kind == "tensor":
            found = next(t for t in reader.tensors if t.name == name).data.tobytes()
        else:
            continue
        assert found == path.read_bytes(), f"{path.name} differs"
        compared += 1
    print(f"{compared} arrays and {len(shapes)} shapes agree")


main(*sys.argv[1:])
