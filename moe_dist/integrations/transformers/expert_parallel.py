"""ep_implementation="moe_dist": whole experts on each rank of transformers' group of expert parallelism."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.distributed.expert_parallel import EPImplementation

from moe_dist.comm import Comm
from moe_dist.errors import UnsupportedError
from moe_dist.integrations.transformers.comms import comm_of
from moe_dist.integrations.transformers.forms import check_structure, tensors_of
from moe_dist.integrations.transformers.kept import Kept
from moe_dist.integrations.transformers.settings import Settings
from moe_dist.integrations.transformers.steps import check_inference, routing_of
from moe_dist.model.spec import ParallelSpec, split_bounds


class MoeDistEP(EPImplementation):  # type: ignore[misc]  # transformers has no types
    """Of one experts module. Tokens are replicated where the group of expert parallelism is that of tensor parallelism,
    sharded otherwise; where ranks of tensor parallelism share a batch in a larger group, each takes its part of it.

    Made while the weights are on meta and nothing of a rank's device is known: the layer follows at the first call.
    """

    settings: ClassVar[Settings] = Settings()

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        """Raises UnsupportedError for experts that moe_dist does not compute."""
        super().__init__(experts, ep_mesh, tp_mesh)
        check_structure(experts)
        self._experts, self._ep_group, self._tp_group = experts, ep_mesh.get_group(), tp_mesh.get_group()
        self._parts = 1 if self.shares_batch else tp_mesh.size()
        layout = "replicated" if self.shares_batch else "sharded"
        self._kept = Kept(ParallelSpec(ep=ep_mesh.size()), layout, self.settings)  # type: ignore[arg-type]
        self._ep: Comm | None = None
        self._tp: Comm | None = None

    @torch.compiler.disable
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, K] global ids, top_k_weights [T, K], to [T, H] in the dtype of
        hidden_states. Collective. Raises ConfigError where a gradient is wanted, RankFailure for a rank that does not
        come in time."""
        check_inference(hidden_states, top_k_weights, self._experts.parameters(recurse=False))
        device = hidden_states.device
        self._ep = self._ep or comm_of(self._ep_group, device, self.settings.timeout_s)
        fsdp = isinstance(self._experts, FSDPModule)  # it takes the weights away between two calls
        if fsdp and self.settings.graph_buckets:
            reason = "FSDP takes the experts' weights away between steps, and a graph reads them where they were"
            raise UnsupportedError(f"graph_buckets = {self.settings.graph_buckets}", [reason], "()")
        tensors = tensors_of(self._experts)
        steps = self._kept.steps(self._experts, tensors, top_k_index.shape[1], self._ep, keep=not fsdp)
        if self._parts == 1:
            return steps(hidden_states, routing_of(top_k_index, top_k_weights))
        self._tp = self._tp or comm_of(self._tp_group, device, self.settings.timeout_s)
        bounds = split_bounds(len(hidden_states), self._parts)
        start, stop = bounds[self._tp.rank]
        y_tH = steps(hidden_states[start:stop], routing_of(top_k_index[start:stop], top_k_weights[start:stop]))
        return _gathered(y_tH, bounds, self._tp)


def _gathered(y_tH: Tensor, bounds: list[tuple[int, int]], comm: Comm) -> Tensor:
    """The parts of all ranks of a batch, one behind another; the first part is the longest."""
    longest = bounds[0][1] - bounds[0][0]
    padded = torch.nn.functional.pad(y_tH, (0, 0, 0, longest - len(y_tH)))
    (everyone,) = comm.all_gather([padded])
    return torch.cat(
        [part[: stop - start] for part, (start, stop) in zip(everyone.split(longest), bounds, strict=True)]
    )


def implementation(settings: Settings) -> type[MoeDistEP]:
    """What transformers' registry takes."""
    return type("MoeDistEP", (MoeDistEP,), {"settings": settings, "__doc__": MoeDistEP.__doc__})
