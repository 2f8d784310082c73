"""Who may ask: this computer alone, or whoever has the key. Torch-free: checked before a model is opened."""

import hmac
import ipaddress
import os

KEY = "SERVE_API_KEY"


def key() -> str:
    """Empty for none."""
    return os.environ.get("SERVE_API_KEY", "").strip()


def presents(key: str, authorization: str) -> bool:
    """Does this Authorization header hold the key?"""
    scheme, _, given = authorization.partition(" ")
    # Compared in constant time: how long it takes tells nothing about the key.
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def name_in(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
