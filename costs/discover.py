"""Finds runs below a URL, and measures the storage of a run."""

from collections.abc import Iterator, Mapping

from core import bucket, storage
from core.errors import ConfigError
from core.run.folder import RunFolder
from core.run.model import Run
from costs.model import StorageRates, StorageUse

DEPTH = 3
FORECAST_BUCKET = "s3://forecast"  # a forecast assumes a bucket at the current endpoint
# Folders without runs in them.
_NO_RUNS = {"checkpoints", "ledger", "metrics", "shards", "train", "val"}

# Public list prices in US dollars by storage service, of the first tier and without the free allowance. S3's prices of
# requests and egress are the long-standing ones of us-east-1; they are assumed until a bill confirms them.
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
    """The URL of the folder `runs` in BUCKET, which launches use. Raises ConfigError."""
    if not environment.get("BUCKET"):
        raise ConfigError("no run given; name a RUN_URL, or set BUCKET to show all runs in it")
    return storage.join(bucket.root(environment), "runs")


def find_runs(url: str, depth: int = DEPTH) -> Iterator[str]:
    """URLs of the runs at or below `url`, in order, at most `depth` folders down. One listing per folder.

    The preparation and the evaluations of a run have ledgers in subfolders of the run, and count as other runs.
    """
    names = storage.list_names(url)
    folder = RunFolder(url)
    if {_name(folder.description), _name(folder.ledger)} & set(names):
        yield url
        yield from (each for each in (folder.preparation, folder.evaluations) if _name(each) in names)
    elif depth:
        for name in names:
            if "." not in name and name not in _NO_RUNS:
                yield from find_runs(storage.join(url, name), depth - 1)


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def storage_use(run: Run) -> StorageUse:
    """Number and bytes of the objects that were there when `run` was read."""
    checkpoints = f"{run.folder.checkpoints}/"
    return StorageUse(
        len(run.objects),
        sum(each.size for each in run.objects),
        sum(each.size for each in run.objects if each.uri.startswith(checkpoints)),
        rates_for(run.url),
    )


def rates_for(url: str) -> StorageRates | None:
    """Rates of the store behind a URL; None if they are unknown."""
    return RATES.get(storage.terms_of(url).service)
