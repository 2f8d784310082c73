"""Draws texts of the code or of the documents, to be read as a stranger reads them.

python -m tests.prose_sample --seed=7               60 docstrings, comments and messages, spread over the packages
python -m tests.prose_sample --docs --seed=7        60 paragraphs, list items, table rows and help texts
python -m tests.prose_sample --pattern              every one with a phrase that usually needs a second reading
python -m tests.prose_sample --package=costs --all
"""

import argparse
import ast
import io
import random
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("bench", "clouds", "core", "costs", "data_prep", "demo", "launch", "trainer")
MAKEFILES = ("Makefile", "launch/targets.mk")
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


def words_beside_code(line: str) -> int:
    return len(re.findall(r"[^\W\d_]{2,}", re.sub(r"`[^`]*`", "", line)))


def paragraphs(file: Path) -> Iterator[Text]:
    """Paragraphs, list items and table rows of a Markdown file, without code. Rows of docs/parity.md are left out."""
    name = file.relative_to(ROOT).as_posix()
    heading, titles, kind, started, block = "", "", "", 0, []
    fenced = False
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate([*lines, ""], 1):
        item = re.match(r"\s*([-*]|\d+\.) ", line)
        begins_row = line.startswith("|")
        marked = line.startswith(("```", "#", "<!--"))
        continues = bool(line.strip()) and not (item or begins_row or marked or fenced)
        if block and not continues:
            if words_beside_code(" ".join(block)) >= WORDS:
                yield Text(f"{name}:{started}", f"{kind}; {heading}", " ".join(block))
            block = []
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or not line.strip():
            continue
        elif line.startswith("#"):
            heading = line.lstrip("# ")
        elif begins_row:
            if number < len(lines) and lines[number].startswith("|--"):
                titles = line
            elif name != "docs/parity.md" and words_beside_code(line) >= WORDS:
                yield Text(f"{name}:{number}", f"row; {heading}; columns: {titles}", line)
        elif block:
            block.append(line)
        elif not marked and (item or not line.startswith("    ")):
            kind, started, block = "item" if item else "paragraph", number, [line]


def help_texts(file: Path) -> Iterator[Text]:
    """Texts that `--help` of a program prints, or `make` beside a target."""
    name = file.relative_to(ROOT).as_posix()
    source = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        for number, line in enumerate(source.splitlines(), 1):
            if found := re.match(r"([a-z][a-z-]*):.* ## (.*)|##@ (.*)", line):
                yield Text(f"{name}:{number}", f"make {found[1]}" if found[1] else "make, title", found[2] or found[3])
        return
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        option = next((one.value for one in node.args if isinstance(one, ast.Constant)), "")
        for given in node.keywords:
            if given.arg in ("help", "description") and isinstance(given.value, ast.Constant | ast.JoinedStr):
                words = ast.unparse(given.value).strip("f").strip("'\"")
                if words_beside_code(words) >= WORDS:
                    yield Text(f"{name}:{given.value.lineno}", f"help of {option}", words)


def of_the_documents() -> Iterator[Text]:
    for file in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))):
        yield from paragraphs(file)
    programs = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    for file in (ROOT / "cost_report.py", *programs, *(ROOT / name for name in MAKEFILES)):
        yield from help_texts(file)


def of_the_code(packages: Iterable[str]) -> Iterator[Text]:
    for package in packages:
        for file in sorted((ROOT / package).rglob("*.py")):
            yield from texts(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=60)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--package", choices=PACKAGES, action="append")
    chosen.add_argument("--docs", action="store_true", help="README, docs/, changelog and help texts, not the code")
    parser.add_argument("--all", action="store_true", help="every text in the order of the files, not a sample")
    parser.add_argument("--pattern", action="store_true", help="only texts with a phrase that is often hard to read")
    options = parser.parse_args()
    found = list(of_the_documents() if options.docs else of_the_code(options.package or PACKAGES))
    if options.pattern:
        found = [text for text in found if PHRASES.search(text.words)]
    elif not options.all:
        found = random.Random(options.seed).sample(found, min(options.count, len(found)))
    for text in found:
        print(f"{text.place} ({text.kind})\n    {' '.join(text.words.split())}\n")
    print(f"{len(found)} texts")


if __name__ == "__main__":
    main()
