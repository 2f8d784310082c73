"""Sends a small HTTP request, with a time limit for the whole answer.

    headers, body = web.fetch("https://s3.amazonaws.com", 10.0)

The limit of urlopen applies to each read, so an answer of a byte a second would keep the caller forever.
"""

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from urllib.request import Request


def fetch(request: "str | Request", seconds: float) -> tuple[Mapping[str, str], bytes]:
    """Headers and body of the answer.

    Raises urllib.error.HTTPError if the server refuses the request, ValueError if the address is not a URL, and OSError
    if no complete answer arrives within `seconds`.
    """
    import http.client  # imported here: these imports take 40 ms, and most programs send no such request
    import urllib.request

    answers: list[tuple[Mapping[str, str], bytes]] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                answers.append((answer.headers, answer.read()))
        except http.client.HTTPException as error:
            errors.append(OSError(f"no complete answer ({type(error).__name__}: {error})"))
        except Exception as error:
            errors.append(error)

    asking = threading.Thread(target=ask, name="request", daemon=True)
    asking.start()
    asking.join(seconds)
    if answers:
        return answers[0]
    raise errors[0] if errors else TimeoutError(f"no complete answer within {seconds:g} s")
