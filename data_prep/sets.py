"""Stores example sets beside the token shards: HellaSwag, and rows for fine-tuning and preference optimisation.

    python -m data_prep.sets hellaswag DATA_URL [--from=URL]
    python -m data_prep.sets instructions DATA_URL --from=rows.jsonl [--name=instructions] [--licence=...]
    python -m data_prep.sets preferences DATA_URL --from=pairs.jsonl [--name=preferences] [--licence=...]

Reads JSON lines or parquet (local, s3://, gs://, az://, hf://) and checks every row. Writes DATA_URL/sets/<name>.jsonl,
then <name>.json with rows, bytes and SHA-256.
"""

import logging
from collections import Counter
from typing import Any

from core import urls
from core.console import run_entry, set_up_logging
from core.data import sets
from core.data.sets import SetInfo, conversation, preference_row
from core.errors import ConfigError, DataError
from data_prep import hellaswag
from data_prep.hellaswag import json_lines
from data_prep.sources.rows import read_rows

log = logging.getLogger(__name__)

# For each kind of set: the schema, and the function that converts a row.
KINDS = {"instructions": ("conversations", conversation), "preferences": ("preferences", preference_row)}
MAX_BAD_FRACTION = 0.01

USAGE = """python -m data_prep.sets hellaswag DATA_URL [--from=URL]
python -m data_prep.sets instructions DATA_URL --from=URL [--name=instructions] [--licence=TEXT]
python -m data_prep.sets preferences DATA_URL --from=URL [--name=preferences] [--licence=TEXT]

Check an example set and store it below DATA_URL/sets, from where later stages read it.

hellaswag     the 10,042 validation items; --from names a copy of hellaswag_val.jsonl or of the Hub's parquet file
              (default: the Hub); any content other than the published one is refused
instructions  one conversation per row: {"messages": [{"role": ..., "content": ...}, ...]} with the roles system,
              user and assistant, the last one assistant; or ShareGPT's {"conversations": [{"from": "human", "value":
              ...}, {"from": "gpt", "value": ...}]}; or {"instruction": ..., "input": ..., "output": ...} (Alpaca); or
              {"question": ..., "answer": ...}; or {"prompt": ..., "completion": ...}, texts or lists of messages
preferences   one pair per row: {"prompt": ..., "chosen": ..., "rejected": ...}, each a text or a list of messages;
              without a prompt, chosen and rejected are whole conversations, or texts that begin with it
both          a content is a text or a list of text parts; a column `system` is the first message; tools and images
              are refused; columns that are not used are counted"""


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments or not arguments:
        print(USAGE)
        return 0
    set_up_logging()
    flags = dict(argument[2:].partition("=")[::2] for argument in arguments if argument.startswith("--"))
    names = [argument for argument in arguments if not argument.startswith("--")]
    unknown = set(flags) - {"from", "name", "licence"}
    if len(names) != 2 or names[0] not in ("hellaswag", *KINDS) or unknown:
        raise ConfigError(
            f"give a kind and a DATA_URL (got {' '.join(arguments)}); see python -m data_prep.sets --help"
        )
    kind, data_url = names
    urls.check(data_url)
    if kind == "hellaswag":
        info = hellaswag.store(data_url, flags.get("from") or hellaswag.SOURCE)
    else:
        if not flags.get("from"):
            raise ConfigError("--from is missing: name the file with the rows, as --from=rows.jsonl")
        info = store_rows(
            data_url, flags["from"], flags.get("name") or kind, flags.get("licence") or "not stated", kind
        )
    print(f"{data_url}/sets/{info.name}.jsonl: {info.rows:,} rows, {info.bytes:,} bytes, SHA-256 {info.sha256}")
    return 0


def store_rows(data_url: str, source: str, name: str, licence: str, kind: str = "instructions") -> SetInfo:
    """Checks rows and stores the valid rows. Raises DataError if more than MAX_BAD_FRACTION of the rows are invalid."""
    schema, form = KINDS[kind]
    found = read_rows(source)
    good: list[dict[str, Any]] = []
    problems: list[str] = []
    not_used: Counter[str] = Counter()
    for number, row in enumerate(found, 1):
        try:
            good.append(form(row))
            not_used.update(sets.unused(row, schema))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    for problem in problems[:5]:
        log.warning("%s: left out %s", source, problem)
    if not_used:
        columns = ", ".join(f"{name} in {count:,} rows" for name, count in sorted(not_used.items()))
        log.warning("%s: columns that are not used: %s", source, columns)
    if not found:
        raise DataError(f"{source}: holds no rows; give a file with one row per line")
    if not good or len(problems) > MAX_BAD_FRACTION * len(found):
        first = f" ({problems[0]})" if problems else ""
        raise DataError(
            f"{source}: {len(problems)} of {len(found)} rows are not {schema}{first}; "
            "see python -m data_prep.sets --help for their form"
        )
    return sets.write(data_url, name, schema, source, licence, json_lines(good))


if __name__ == "__main__":
    run_entry(main)
