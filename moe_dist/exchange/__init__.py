"""How tokens reach the ranks that hold their experts, and how the partial outputs come back."""

from typing import Any

from moe_dist.exchange.base import Exchange
from moe_dist.registry import Registry

EXCHANGES: Registry[Exchange[Any, Any]] = Registry(
    "exchange",
    {
        "local": "moe_dist.exchange.replicated:Local",
        "all_reduce": "moe_dist.exchange.replicated:AllReduce",
        "ag_rs": "moe_dist.exchange.ag_rs:AllGatherReduceScatter",
        "all_to_all": "moe_dist.exchange.all_to_all:AllToAll",
        "hierarchical": "moe_dist.exchange.hierarchical:Hierarchical",
        "nvlink": "moe_dist.exchange.nvlink:Nvlink",
        "fused": "moe_dist.exchange.fused:Fused",
    },
    Exchange,
)

__all__ = ["EXCHANGES", "Exchange"]
