"""Small sets, stored once beside the token shards: HellaSwag, and rows for fine-tuning and preference optimisation.

    python -m data_prep.sets hellaswag DATA_URL [--from=URL]
    python -m data_prep.sets instructions DATA_URL --from=rows.jsonl [--name=instructions] [--licence=...]
    python -m data_prep.sets preferences DATA_URL --from=pairs.jsonl [--name=preferences] [--licence=...]

Reads JSON lines or parquet (local, s3://, gs://, az://, hf://), checks every row, writes DATA_URL/sets/<name>.jsonl and
then <name>.json with rows, bytes and SHA-256.
"""

from core import urls
from core.console import run_entry, set_up_logging
from core.errors import ConfigError
from data_prep import hellaswag, instructions

USAGE = """python -m data_prep.sets hellaswag DATA_URL [--from=URL]
python -m data_prep.sets instructions DATA_URL --from=URL [--name=instructions] [--licence=TEXT]
python -m data_prep.sets preferences DATA_URL --from=URL [--name=preferences] [--licence=TEXT]

Store a small set below DATA_URL/sets, checked, so that later stages need nobody else's server.

hellaswag     the 10,042 validation items; --from names a copy of hellaswag_val.jsonl or of the Hub's parquet file
              (default: the Hub); anything but the published content is refused
instructions  one conversation per row: {"messages": [{"role": ..., "content": ...}, ...]} with the roles system,
              user and assistant, the last one assistant; or {"instruction": ..., "input": ..., "output": ...}
preferences   one pair per row: {"prompt": ..., "chosen": ..., "rejected": ...}; the prompt is a text or a list of
              messages, and chosen and rejected are answers to it, or whole lists of messages"""


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments or not arguments:
        print(USAGE)
        return 0
    set_up_logging()
    flags = dict(argument[2:].partition("=")[::2] for argument in arguments if argument.startswith("--"))
    names = [argument for argument in arguments if not argument.startswith("--")]
    unknown = set(flags) - {"from", "name", "licence"}
    if len(names) != 2 or names[0] not in ("hellaswag", *instructions.KINDS) or unknown:
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
        info = instructions.store(
            data_url, flags["from"], flags.get("name") or kind, flags.get("licence") or "not stated", kind
        )
    print(f"{data_url}/sets/{info.name}.jsonl: {info.rows:,} rows, {info.bytes:,} bytes, SHA-256 {info.sha256}")
    return 0


if __name__ == "__main__":
    run_entry(main)
