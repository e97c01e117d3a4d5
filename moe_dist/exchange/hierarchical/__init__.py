"""Exchange `hierarchical`: over several nodes, each row crosses the network once per node that needs it."""

from moe_dist.exchange.hierarchical.exchange import Hierarchical

__all__ = ["Hierarchical"]
