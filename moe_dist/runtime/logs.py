"""What a dead rank left in its log."""

from __future__ import annotations

import os

TAIL_BYTES = 1 << 16
LONGEST = 200
RAYS_OWN = (":actor_name:", ":job_id:", ":task_name:")  # marks that Ray puts between a worker's lines


def said_last(path: str | None) -> str:
    """The log's path and the line of it that says most: what an exception said, else the last. "" without a log."""
    if not path:
        return ""
    try:
        with open(path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except OSError:
        return f"; its log: {path}"
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(RAYS_OWN)]
    telling = [line for line in lines if "what():" in line or "Error: " in line]
    said = (telling or lines)[-1:]
    return f"; its log: {path}" + (f", which says: {said[0][:LONGEST]}" if said else ", which is empty")
