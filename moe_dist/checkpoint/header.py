"""The header of a safetensors file, looked at before the library opens it. The library refuses offsets that overlap,
leave gaps or lie outside, and shapes that overflow; it takes headers of 100 MB and keys that stand twice."""

from __future__ import annotations

import json
from pathlib import Path

from moe_dist.files import unique_keys

HEADER_LIMIT = 16 << 20  # bytes; 140,000 tensors in one file would take 16 MB, and models of so many have 60 files
LENGTH = 8  # bytes of the number in front of the header


def check_header(path: Path) -> None:
    """Raises ValueError, or OSError, for a header that is too long for the file or for anybody, is no JSON object or
    names a tensor twice: which of the two is read would depend on the reader."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        if length > HEADER_LIMIT:
            raise ValueError(f"its header of {length:,} bytes is larger than the {HEADER_LIMIT:,} that are read")
        text = file.read(length)
    if len(text) < length:
        raise ValueError(f"its header ends after {len(text):,} of {length:,} bytes")
    try:
        found = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("its header is no JSON object")
