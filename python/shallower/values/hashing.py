"""The one way to hash what a result depends on: canonical JSON, then SHA-256."""

import hashlib
import json
from typing import Any


def hash_of(value: Any) -> str:
    """The SHA-256 of a JSON value, in hexadecimal, whatever the order of its keys."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), default=lambda inside: inside.to_json()
    )
    return hashlib.sha256(text.encode()).hexdigest()
