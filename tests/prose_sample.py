"""Draws docstrings, comments, help texts and messages of the code, to be read as a stranger reads them.

python -m tests.prose_sample --seed=7               60 of them, spread over the packages
python -m tests.prose_sample --pattern              every one with a phrase that usually needs a second reading
python -m tests.prose_sample --package=costs --all
"""

import argparse
import ast
import io
import random
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("bench", "clouds", "core", "costs", "data_prep", "demo", "launch", "trainer")
WORDS = 5  # of a text worth reading
PHRASES = re.compile(
    r"^(what|how|where|whether|why|which|who|when|as|in|of|from|by|on|at|with|for)\b"
    r"|\bis no \b|\btold\b|\bnobody\b|\bwhoever\b|\bsomebody\b|\bin vain\b|\bby itself\b|\bits own\b|\bstands?\b"
    r"|\blies\b|\bas it is\b|\bthat which\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Text:
    place: str
    kind: str
    words: str


def texts(file: Path) -> Iterator[Text]:
    source = file.read_text(encoding="utf-8")
    name = file.relative_to(ROOT).as_posix()
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (words := ast.get_docstring(node)) is not None:
            first = node.body[0]
            docstrings.add(first.value)
            yield Text(f"{name}:{first.lineno}", "docstring", words)
    for node in ast.walk(tree):
        spoken = isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings
        if spoken and len(node.value.split()) >= WORDS:
            yield Text(f"{name}:{node.lineno}", "message", node.value)
    comment: list[str] = []
    started = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            started = started if comment else token.start[0]
            comment.append(token.string.lstrip("# "))
        elif token.type != tokenize.NL and comment:
            if len(" ".join(comment).split()) >= WORDS:
                yield Text(f"{name}:{started}", "comment", " ".join(comment))
            comment = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--package", choices=PACKAGES, action="append")
    parser.add_argument("--all", action="store_true", help="every text in the order of the files, not a sample")
    parser.add_argument("--pattern", action="store_true", help="only texts with a phrase that is often hard to read")
    options = parser.parse_args()
    files = [file for package in options.package or PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    found = [text for file in files for text in texts(file)]
    if options.pattern:
        found = [text for text in found if PHRASES.search(text.words)]
    elif not options.all:
        found = random.Random(options.seed).sample(found, min(options.count, len(found)))
    for text in found:
        print(f"{text.place} ({text.kind})\n    {' '.join(text.words.split())}\n")
    print(f"{len(found)} texts")


if __name__ == "__main__":
    main()
