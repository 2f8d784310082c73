"""Defines the exceptions that a user can see, one class for each kind of remedy.

    LauncherError
    ├── ConfigError         the settings are wrong: edit the YAML, a flag or a variable
    ├── DataError           stored tokens, manifests or source documents are wrong
    ├── StorageError        the bucket, its credentials or the network are at fault
    │   ├── ObjectNotFound  the object does not exist
    │   ├── ObjectExists    another writer created it first (exclusive creation)
    │   ├── ObjectDamaged   the object's content does not match its checksum or size
    │   └── DiskFull        the disk or its quota is full
    ├── CheckpointError     checkpoints exist but cannot be used
    ├── RunError            the run folder belongs to another run, or a newer segment has taken the run over
    ├── EndpointError       a model behind an API does not answer
    ├── TrainingError       the loss or a gradient is NaN or infinite
    └── CapReached          not a failure: the dollars that the cap allows are spent

A message is one sentence. It says what is wrong (with the value), where it is wrong (file and key, URI, rank, step) and
how to fix it. Entries print it without a traceback and exit non-zero (`core.console.run_entry`).
"""

LONGEST_LINE = 500


class LauncherError(Exception):
    """Base of all errors that are reported as one sentence."""


class ConfigError(LauncherError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class DataError(LauncherError):
    """Source documents, shards or a manifest are missing, damaged or of the wrong kind."""


class StorageError(LauncherError):
    """An object store refused a request, or the request still failed after all retries."""


class ObjectNotFound(StorageError):
    """No object exists at this URI."""


class ObjectExists(StorageError):
    """Exclusive creation failed: an object exists at this URI."""


class ObjectDamaged(StorageError):
    """The content of the object at this URI does not have the expected checksum, or exceeds the allowed size."""


class DiskFull(StorageError):
    """A local write failed because the disk or a quota is full. A retry fails too until space is freed."""


class CheckpointError(LauncherError):
    """None of the existing checkpoints can be used, or a checkpoint cannot be written."""


class RunError(LauncherError):
    """The run folder holds another run, or a newer segment of this run has taken over."""


class EndpointError(LauncherError):
    """A model behind an API does not answer, or leaves some prompts without an answer."""


class TrainingError(LauncherError):
    """The loss or a gradient is not finite."""


class CapReached(LauncherError):
    """The money that the cap allows is spent. All work is stored; this is not a failure."""


def one_line(error: BaseException, longest: int = LONGEST_LINE) -> str:
    """Any exception as one line: its type and its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:longest]
