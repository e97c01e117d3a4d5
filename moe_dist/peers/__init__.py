"""Whole layers of other packages, exchange included, which are measured beside ours and never chosen. None comes with
moe_dist: what can run behind a MoELayer does (exchange `fused`)."""

from moe_dist.peers.base import Peer, PeerCase, PeerStep
from moe_dist.registry import Registry

PEERS: Registry[Peer] = Registry("peer", {}, Peer)

__all__ = ["PEERS", "Peer", "PeerCase", "PeerStep"]
