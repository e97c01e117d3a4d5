"""The one door for tensors from outside: tokens, routing and shards are checked here, for every exchange and backend.

Shapes, dtypes and devices are always checked. Values are checked where looking at them costs nothing, which is on a
CPU; on a GPU the host would have to wait, so there it is a debug mode (`MOE_DIST_DEBUG=1`, or `debug=True` of a layer).
Without it an id that is no expert's counts as -1 on a GPU: no kernel reads beyond its tables.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from moe_dist.errors import ConfigError
from moe_dist.messages.counts import count_of
from moe_dist.model.routing import Routing, check_own_memory
from moe_dist.model.spec import MOST_TOKENS, MoESpec
from moe_dist.model.weights import ExpertWeights

FINITE = "finite values"
NOT_TRACED = "it works with its process's ranks through its communicator, which no traced or exported program holds"
NO_EXPERT, LARGEST_ID = -2, 2**31 - 1  # the first is refused where values are looked at
ALIGNMENT = 16  # bytes; rows are read so many at a time, and viewed as words


def check_tokens(x_TH: Tensor, spec: MoESpec, device: torch.device) -> None:
    """Raise ConfigError unless `x_TH` is [T, H] in the spec's dtype, on `device`."""
    if not isinstance(x_TH, Tensor):
        raise ConfigError("x", type(x_TH).__name__, "is no tensor", f"[tokens, {spec.hidden}]")
    _check_dense("x", x_TH)
    if x_TH.ndim != 2 or x_TH.shape[1] != spec.hidden:
        raise ConfigError("x", tuple(x_TH.shape), "wrong shape", f"[tokens, {spec.hidden}]")
    _check_kind("x", x_TH, spec.torch_dtype, device)


def check_not_exported() -> None:
    """Raise ConfigError inside of torch.export and torch.jit.trace. Where Dynamo reads the code, as in a strict export,
    it makes an error of its own of this one."""
    if torch.compiler.is_dynamo_compiling():
        if torch.compiler.is_exporting():
            raise RuntimeError(NOT_TRACED)
        return
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        way = "torch.export" if torch.compiler.is_exporting() else "torch.jit.trace"
        raise ConfigError("layer", f"inside of {way}", NOT_TRACED, "the layer itself, in the process that made it")


def check_gradient(name: str, tensor: Tensor) -> None:
    """Raise ConfigError where a gradient, or a tangent of forward mode, is expected to come back."""
    if not isinstance(tensor, Tensor):
        return
    rule = "the layer is forward only, no gradient would come back through it"
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ConfigError(f"{name}.requires_grad", True, rule, "tensor.detach(), or a call under torch.no_grad()")
    if is_functorch_wrapped_tensor(tensor):
        raise ConfigError(name, "inside a transform of torch.func", rule, "a call outside of grad, jvp, vmap, …")
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise ConfigError(name, "a dual tensor", rule, "tensor.detach()")


def check_bucket(bucket: int | None, tokens: int) -> None:
    """Raise ConfigError for a max_tokens_per_rank that is no integer, less than this rank's tokens, or more than any
    step may have."""
    if bucket is None:
        return
    if type(bucket) is not int:
        raise ConfigError("max_tokens_per_rank", bucket, "must be an integer", f"an integer, {tokens} to {MOST_TOKENS}")
    if not tokens <= bucket <= MOST_TOKENS:
        rule = f"this rank has {count_of(tokens, 'token')} and all ranks step at one agreed size"
        raise ConfigError("max_tokens_per_rank", bucket, rule, f"an integer, {tokens} to {MOST_TOKENS}")


def check_routing(routing: Routing, tokens: int, spec: MoESpec, device: torch.device) -> None:
    """Raise ConfigError unless ids int32 and weights float32 are [T, K] on `device`."""
    if not isinstance(routing, Routing):
        raise ConfigError("routing", type(routing).__name__, "is no Routing", "Routing(ids_TK, weights_TK)")
    expected = (tokens, spec.top_k)
    for name, tensor, dtype in (
        ("routing.ids", routing.ids_TK, torch.int32),
        ("routing.weights", routing.weights_TK, torch.float32),
    ):
        if not isinstance(tensor, Tensor):
            raise ConfigError(name, type(tensor).__name__, "is no tensor", str(expected))
        _check_dense(name, tensor)
        if tuple(tensor.shape) != expected:
            raise ConfigError(name, tuple(tensor.shape), "wrong shape", str(expected))
        _check_kind(name, tensor, dtype, device)


def routing_from(ids_TK: Tensor, weights_TK: Tensor, look: bool) -> Routing:
    """Of ids [T, K] of any integer dtype and weights [T, K] of any float dtype, as other stacks have them. Raises
    ConfigError for others. With `look`, an id that int32 does not hold stays no expert's; without, which saves a
    launch, it counts by its lower 32 bits."""
    for name, tensor, legal in (
        ("routing.ids", ids_TK, "a tensor of integers"), ("routing.weights", weights_TK, "a tensor of floats"),
    ):  # fmt: skip
        if not isinstance(tensor, Tensor):
            raise ConfigError(name, type(tensor).__name__, "is no tensor", legal)
        _check_dense(name, tensor)
        floats = tensor.dtype.is_floating_point
        integers = not floats and not tensor.dtype.is_complex and tensor.dtype != torch.bool
        if not (integers if name == "routing.ids" else floats):
            raise ConfigError(f"{name}.dtype", tensor.dtype, "wrong dtype", legal)
    if look and ids_TK.dtype == torch.int64:
        ids_TK = ids_TK.clamp(NO_EXPERT, LARGEST_ID)
    return Routing(ids_TK.to(torch.int32).contiguous(), weights_TK.float().contiguous())


def check_values(routing: Routing, spec: MoESpec, x_TH: Tensor | None = None) -> None:
    """Raise ConfigError for an id that is neither -1 nor an expert's, and for a weight that is NaN or infinite where
    its id is an expert's, or for the token of `x_TH` that a router made it of. The host waits for a GPU."""
    ids_TK, weights_TK = routing.ids_TK, routing.weights_TK
    wrong = (ids_TK < -1) | (ids_TK >= spec.num_experts)
    bad = _not_finite(routing, spec.num_experts)
    counts = torch.stack([wrong.sum(), bad.sum()]).tolist()  # one wait for both
    for name, values, places, count, legal in (
        ("routing.ids", ids_TK, wrong, counts[0], f"-1 (none), 0 to {spec.num_experts - 1}"),
        ("routing.weights", weights_TK, bad, counts[1], FINITE),
    ):
        if count:
            token = int(places.nonzero()[0, 0])
            if x_TH is not None:  # the layer's own router made it: the caller knows of no routing
                finite = bool(x_TH[token].isfinite().all())
                found = "finite, but too large" if finite else "NaN or infinite"
                legal = "values whose products with the router's weight float32 holds" if finite else FINITE
                raise ConfigError("x", found, f"of token {token}, which no router can route", legal)
            _refuse_first(name, values, places, legal)


def check_weights(routing: Routing, experts: int) -> None:
    """The same of the weights alone, for ids that may be of no expert."""
    bad = _not_finite(routing, experts)
    if bool(bad.any()):
        _refuse_first("routing.weights", routing.weights_TK, bad, FINITE)


def _not_finite(routing: Routing, experts: int) -> Tensor:
    return routing.legal(experts) & ~routing.weights_TK.isfinite()


def _refuse_first(name: str, values_TK: Tensor, places_TK: Tensor, legal: str) -> None:
    token, place = places_TK.nonzero()[0].tolist()
    rule = f"of token {token}, place {place}, the first of {int(places_TK.sum())} such"
    raise ConfigError(name, values_TK[token, place].item(), rule, legal)


def check_shard(
    name: str, weights: ExpertWeights, spec: MoESpec, experts: int, width: int, device: torch.device, whose: str
) -> None:
    """Raise ConfigError unless `weights` are `experts` experts of `spec` with `width` columns: every tensor that the
    format has, no other, each of its shape and dtype, contiguous, on `device`. `whose` goes into the message."""
    if not isinstance(weights, ExpertWeights):
        raise ConfigError(name, type(weights).__name__, "is no ExpertWeights")
    if weights.kind != spec.quant:
        raise ConfigError(f"{name}.kind", weights.kind, "not the plan's format", spec.quant)
    if weights.gated != spec.gated:
        raise ConfigError(f"{name}.gated", weights.gated, f"activation {spec.activation} says otherwise", spec.gated)
    wanted, found = ExpertWeights.forms(spec, experts, width), weights.tensors()
    for field, (shape, dtype) in wanted.items():
        label = f"{name}.{field.rpartition('_')[0] or field}"
        if field not in found:
            raise ConfigError(label, None, f"{spec.quant_label} has this tensor", shape)
        tensor = found.pop(field)
        _check_dense(label, tensor)
        if tuple(tensor.shape) != shape:
            raise ConfigError(label, tuple(tensor.shape), f"not what {whose} holds under this plan", shape)
        _check_kind(label, tensor, dtype, device)
        check_gradient(label, tensor)
        if not tensor.is_contiguous():
            raise ConfigError(f"{label}.stride", tensor.stride(), "must be contiguous", "tensor.contiguous()")
    for field in found:
        raise ConfigError(f"{name}.{field}", "given", f"{spec.quant_label} has no such tensor", tuple(wanted))


def _check_kind(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise ConfigError(f"{name}.dtype", tensor.dtype, "wrong dtype", dtype)
    if tensor.device != device:
        raise ConfigError(f"{name}.device", tensor.device, "not the device of this rank's communicator", device)


def _check_dense(name: str, tensor: Tensor) -> None:
    """Before all else: others may have no shape, or one that says nothing of what they hold."""
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise ConfigError(f"{name}.layout", layout, "must be a dense tensor", torch.strided)
    check_own_memory(name, tensor)


def plain_rows(x_TH: Tensor) -> Tensor:
    """`x_TH` with one row right behind the other, from a multiple of 16 bytes on. A single row that is cut out of a
    wider tensor is contiguous, wherever it begins, and has the wider one's stride."""
    aligned = x_TH.data_ptr() % ALIGNMENT == 0 and x_TH.storage_offset() * x_TH.itemsize % ALIGNMENT == 0
    if aligned and x_TH.stride() == (x_TH.shape[1], 1):
        return x_TH
    return torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device).copy_(x_TH)
