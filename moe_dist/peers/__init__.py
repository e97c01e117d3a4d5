"""Whole layers of other packages, exchange included, which are measured beside ours and never chosen."""

from moe_dist.peers.base import Peer, PeerCase, PeerStep
from moe_dist.registry import Registry

PEERS: Registry[Peer] = Registry("peer", {"deep_gemm_mega": "moe_dist.peers.deep_gemm_mega:DeepGemmMega"}, Peer)

__all__ = ["PEERS", "Peer", "PeerCase", "PeerStep"]
