"""Write the Python standard library as JSON lines: real text that every machine has, one document a source file.

python examples/quickstart/stdlib_documents.py OUT.jsonl [CHARACTERS]

Takes files in a fixed random order until CHARACTERS (default 2,500,000) are there, then writes them sorted by name.
"""

import json
import pathlib
import random
import sys
import sysconfig

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
LONGEST_FILE = 150_000  # the few longer ones are tables


def source_files(library: pathlib.Path) -> list[pathlib.Path]:
    """The library's own sources, sorted, without tests and packages that were installed later."""
    files = [file for file in library.rglob("*.py") if not SKIPPED & set(file.relative_to(library).parts)]
    return sorted(file for file in files if 0 < file.stat().st_size <= LONGEST_FILE)


def main() -> None:
    output = pathlib.Path(sys.argv[1])
    characters = int(sys.argv[2]) if len(sys.argv) > 2 else 2_500_000
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = source_files(library)
    random.Random(0).shuffle(files)
    documents = {}
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if (characters := characters - len(text)) < 0:
            break
        documents[file.relative_to(library).as_posix()] = text
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", encoding="utf-8") as lines:
        for name, text in sorted(documents.items()):
            lines.write(json.dumps({"id": name, "text": text}) + "\n")
    print(f"{len(documents)} documents, {sum(map(len, documents.values())):,} characters in {output}")


if __name__ == "__main__":
    main()
