"""One-sided: each rank stores rows into the memory of those that need them, and partial sums come back the same way.

exchange.py: the exchange. window.py: where things lie in the memory that ranks share. kernels.py: what crosses, the
flags, and why they suffice. sinks.py: what takes partial sums. engines.py: when copy engines move things instead.
"""

from moe_dist.exchange.nvlink.exchange import Nvlink

__all__ = ["Nvlink"]
