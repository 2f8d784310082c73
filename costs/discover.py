"""Finds runs below a URL, and measures the storage of a run."""

import functools
from collections.abc import Iterator, Mapping

from core import bucket, storage
from core.errors import ConfigError, LauncherError
from core.run.folder import RunFolder
from core.run.model import Run, Segment
from core.run.reader import Objects, ledger_listing, read_money
from core.storage import ObjectInfo
from costs.model import StorageRates, StorageUse

DEPTH = 3
NEAR_SECONDS = 86400.0  # assumed longest time that a machine is up before or after a run's own segments
FORECAST_BUCKET = "s3://forecast"  # any bucket name: a forecast needs only the rates of the current endpoint
# These folders contain no runs.
_NO_RUNS = {"checkpoints", "ledger", "metrics", "shards", "train", "val"}

# Public list prices in US dollars by storage service, of the first tier and without the free allowance. For requests
# and egress of S3, the prices of us-east-1 are assumed, which have not changed for years. No bill has confirmed them.
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
    """URLs of the runs at or below `url`, in order, at most `depth` folders down. Each folder is listed once.

    The preparation, evaluations, servers and exports of a run have ledgers in subfolders of the run. Each such
    subfolder counts as a separate run.
    """
    names = storage.list_names(url)
    folder = RunFolder(url)
    if {_name(folder.description), _name(folder.ledger)} & set(names):
        yield url
        yield from (each for each in folder.beside if _name(each) in names)
    elif depth:
        for name in names:
            if "." not in name and name not in _NO_RUNS:
                yield from find_runs(storage.join(url, name), depth - 1)


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def neighbours(run: Run) -> list[Segment]:
    """Segments of other runs in the same folder that may have used this run's machines.

    Only dollars and times are read, and only from ledgers that were written while the machines may have been up.
    Machines of managed jobs are left out, because jobs do not share machines. Raises StorageError.
    """
    clusters = {
        name
        for segment in run.segments
        if (name := segment.launcher.get("cluster")) and not segment.launcher.get("managed_job_id")
    }
    times = [(segment.started_at, segment.ended_at) for segment in run.segments if segment.started_at is not None]
    if not clusters or not times:
        return []
    first, last = min(start for start, _ in times) - NEAR_SECONDS, max(end for _, end in times) + NEAR_SECONDS
    ledgers = _ledgers_in(_folder_of(run.url))
    # In a copied bucket, objects have the time of the copy, so all ledgers are read.
    is_copy = any(min(map(_written, objects)) > last for objects in ledgers.get(run.url, {}).values())
    found = []
    for url, segments in ledgers.items():
        near = {
            number: objects
            for number, objects in segments.items()
            if is_copy or (min(map(_written, objects)) <= last and max(map(_written, objects)) >= first)
        }
        if url != run.url and near:
            found += [each for each in read_money(url, near) if each.launcher.get("cluster") in clusters]
    return found


def _folder_of(run_url: str) -> str:
    """The folder that contains a run and other runs. For evaluations, this is the folder that contains their run."""
    above = run_url.rstrip("/").rpartition("/")[0]
    return above.rpartition("/")[0] if RunFolder(above).evaluations == run_url else above


@functools.cache
def _ledgers_in(folder: str) -> dict[str, Objects]:
    """The listings of the ledgers of all runs in a folder, by run. Asks once per process."""
    return {url: ledger_listing(url) for url in find_runs(folder, 1)}


def forget_listings() -> None:
    """Forget the listings, so that other runs are looked for again.

    A long-running program calls this before each report.
    """
    _ledgers_in.cache_clear()


def _written(info: ObjectInfo) -> float:
    return info.modified or 0.0


def storage_use(run: Run) -> StorageUse:
    """Number and bytes of the objects that existed when `run` was read."""
    checkpoints = f"{run.folder.checkpoints}/"
    return StorageUse(
        len(run.objects),
        sum(each.size for each in run.objects),
        sum(each.size for each in run.objects if each.uri.startswith(checkpoints)),
        rates_for(run.url),
        _data_bytes(run),
    )


def _data_bytes(run: Run) -> int | None:
    """Bytes of a run's token set.

    None if the run has no token set, if the set was deleted, or if no rates of its store are known.
    """
    section = run.config.get("data")
    url = section.get("url") if isinstance(section, Mapping) else None
    if not isinstance(url, str):
        return None
    try:
        return sum(each.size for each in storage.list_objects(url)) or None if rates_for(url) else None
    except LauncherError:  # the set was moved or removed, or cannot be read from here
        return None


def rates_for(url: str) -> StorageRates | None:
    """Rates of the store behind a URL, or None if they are unknown."""
    return RATES.get(storage.terms_of(url).service)
