"""The process group: every collective goes through `Comm`."""

from moe_dist.comm.group import Comm
from moe_dist.comm.meeting import Meeting
from moe_dist.comm.wires import copied

__all__ = ["Comm", "Meeting", "copied"]
