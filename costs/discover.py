"""Find runs below a URL, and what a run's objects take in storage."""

from collections.abc import Iterator, Mapping

from core import bucket, storage
from core.errors import ConfigError
from core.run.folder import RunFolder
from costs.model import StorageRates, StorageUse

DEPTH = 3
FORECAST_BUCKET = "s3://forecast"  # a forecast assumes a bucket at the endpoint that is set
# Folders of a run, of prepared data or of ours, which hold no runs: not worth a listing.
_NO_RUNS = {"checkpoints", "ledger", "metrics", "shards", "train", "val"}

# Public list prices in US dollars, first tier, no free allowance. Storage and R2: sourced; S3's requests and egress
# are its long-standing us-east-1 prices, an assumption until the bill says otherwise.
RATES = {
    "r2": StorageRates("Cloudflare R2", 0.015, 4.50, 0.36, 0.0, "developers.cloudflare.com/r2/pricing, 2026"),
    "google": StorageRates(
        "Cloud Storage Standard", 0.020, 5.00, 0.40, 0.12, "cloud.google.com/storage/pricing-examples, us-east1"
    ),
    "aws": StorageRates(
        "S3 Standard", 0.023, 5.00, 0.40, 0.09, "aws.amazon.com/s3/pricing, us-east-1; requests assumed"
    ),
}


def runs_url(environment: Mapping[str, str]) -> str:
    """`runs` in BUCKET, where launches keep them. Raises ConfigError."""
    if not environment.get("BUCKET"):
        raise ConfigError("no run given; name a RUN_URL, or set BUCKET to show all runs in it")
    return storage.join(bucket.root(environment), "runs")


def find_runs(url: str, depth: int = DEPTH) -> Iterator[str]:
    """URLs of the runs at or below `url`, in order, at most `depth` folders down. One listing per folder.

    What was measured on a run's weights afterwards has a ledger of its own, in a folder of the run.
    """
    names = storage.list_names(url)
    folder = RunFolder(url)
    if {_name(folder.description), _name(folder.ledger)} & set(names):
        yield url
        if _name(folder.evaluations) in names:
            yield folder.evaluations
    elif depth:
        for name in names:
            if "." not in name and name not in _NO_RUNS:
                yield from find_runs(storage.join(url, name), depth - 1)


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def storage_use(folder: RunFolder) -> StorageUse:
    """Count the objects of a run: one listing."""
    objects = storage.list_objects(folder.url)
    checkpoints = f"{folder.checkpoints}/"
    return StorageUse(
        len(objects),
        sum(each.size for each in objects),
        sum(each.size for each in objects if each.uri.startswith(checkpoints)),
        rates_for(folder.url),
    )


def rates_for(url: str) -> StorageRates | None:
    """What the store behind a URL charges, or None where that is not known."""
    return RATES.get(storage.terms_of(url).service)
