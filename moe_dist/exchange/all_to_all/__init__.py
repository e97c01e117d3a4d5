"""Each token goes once to each rank that holds one of its experts, and one partial sum comes back from each.

exchange.py: the exchange. splits.py: when it pads. lists.py: which rows go where, and its kernels in list_kernels.py
and row_kernels.py.
"""

from moe_dist.exchange.all_to_all.exchange import AllToAll

__all__ = ["AllToAll"]
