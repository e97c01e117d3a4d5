"""One-sided: each rank stores rows into the memory of those that need them, and partial sums come back the same way.

exchange.py: the exchange. window.py: where things lie in the memory that ranks share. flags.py: when they are there,
and why that suffices. row_kernels.py: dispatch. sum_kernels.py, sinks.py: combine. engines.py: what copy engines move
instead. replicated.py, reduce_kernels.py: tokens that every rank has.
"""

from moe_dist.exchange.nvlink.exchange import Nvlink

__all__ = ["Nvlink"]
