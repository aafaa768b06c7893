"""What a wheel must and must not hold: nothing of a megabyte or more but demo data, the licences, `py.typed`."""

from __future__ import annotations

import sys
import zipfile

LIMIT = 1_000_000
NEEDED = ("intarsia/py.typed", "intarsia/cli/__init__.py", "intarsia/demo/data/LICENSE-DATA.md", "intarsia/demo/data/eng_Latn/train.tsv")


def main(path: str) -> int:
    with zipfile.ZipFile(path) as wheel:
        sizes = {entry.filename: entry.file_size for entry in wheel.infolist()}
    wrong = [f"{name} has {size:,} bytes" for name, size in sizes.items() if size >= LIMIT and "/demo/data/" not in name]
    wrong += [f"{name} is missing" for name in NEEDED if name not in sizes]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in sizes):
        wrong.append("the licence is missing")
    wrong += [f"{name} does not belong into a wheel" for name in sizes if not name.startswith("intarsia") or "__pycache__" in name]
    print(f"{path}: {len(sizes)} files, {sum(sizes.values()):,} bytes unpacked" + "".join(f"\nerror: {line}" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
