"""What memory a container leaves: its control groups bound it, whatever the machine has."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
# A limit, what is used of it, and the part of that which the kernel takes back when it is needed: version 2, then 1.
FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def container_memory(root: Path = ROOT, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left under the limit of this process's control group and of each one around it; none where none is set."""
    try:
        groups = [line.strip().split(":", 2)[1:] for line in membership.read_text().splitlines()]
    except (OSError, ValueError):
        groups = []
    found = []
    for controller, limit, usage, reclaimable in FILES:
        base = root / controller
        inside = next((path for kinds, path in groups if controller in kinds.split(",")), "/")
        place = base / inside.lstrip("/")
        for folder in {base, place, *place.parents}:
            if folder == base or base in folder.parents:
                found += _left(folder, limit, usage, reclaimable)
    return found


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> list[int]:
    try:
        bound, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        if bound == "max" or int(bound) >= 1 << 62:  # version 1's way to say that there is none
            return []
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [max(0, int(bound) - used + int(stat.get(reclaimable, 0)))]
