"""What a finished set holds, in a few lines, and what to do with it next."""

from core.data.manifest import Manifest


def show(made: Manifest, url: str) -> None:
    stats = made.stats
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in stats["dropped"].items())
    print(f"documents  {stats['documents']:,}" + (f" (dropped: {dropped})" if dropped else ""))
    for name, split in made.splits.items():
        print(f"{name:<10} {split.tokens:,} tokens, {split.documents:,} documents, {len(split.shards)} shards")
    if not made.splits["val"].tokens:
        print("           nothing to validate on: training will report no validation loss")
    print(f"set        {url} (fingerprint {made.fingerprint[:12]})")
    print(f"check it   python -m data_prep.verify {url}")
    print(f"train      torchrun --nproc-per-node=N -m trainer.train CONFIG --data.url={url} --run.url=RUN_URL")
