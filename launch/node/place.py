"""Prints the URL of a run or of a token set, for shell scripts on a node.

    python3 -m launch.node.place RUN      the run that BUCKET and RUN name: s3://my-bucket/runs/gpt2-124m
    python3 -m launch.node.place DATA     the token set that BUCKET and DATA name

Runs outside of the container with the node's Python, and therefore uses only the standard library of Python 3.8.
"""

import os
import sys

from core import bucket
from core.errors import ConfigError


def main(arguments):
    if len(arguments) != 1 or arguments[0] not in bucket.FOLDERS:
        return "usage: python3 -m launch.node.place RUN|DATA"
    try:
        print(bucket.url(os.environ, arguments[0]))
    except ConfigError as error:
        return f"error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
