"""Expert weights in the one canonical form that checkpoints, sharding, backends and the oracle all agree on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.machine.surroundings import unaffected
from moe_dist.model.placement import Placement
from moe_dist.model.quantization import FP8, FP8_MAX, cast, expand_blocks, quantize_blocks, scale_of
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import BLOCK, MoESpec, QuantKind

# gate, up and down are multiplied with each other: with three such weights and usual tokens the result is near the end
# of float32 and bf16. Trained ones are smaller by ten orders of magnitude.
LARGEST_WEIGHT = 1e10
LARGEST_SCALE = LARGEST_WEIGHT / FP8_MAX
PIECE = 32 << 20  # bytes
MIXERS = (
    -0x61C8864680B583EB,
    0x2545F4914F6CDD1D,
)  # odd, with bits all over: those of Weyl's and of xorshift* generators
OF_HALVES = ("w13_eFH", "s13", "b13_eF")  # of gated experts, gate's half and up's
OAI_ALPHA, OAI_LIMIT = 1.702, 7.0  # of swigluoai


@dataclass
class ExpertWeights:
    """e experts, each y = w2 · act(w13 · x + b13) + b2, with i columns of the intermediate size and F = 2i if gated
    else i.

    w13_eFH: rows are [gate; up], or [up; gate] after `turn`. w2_eHi. FP8 for every fp8 kind, else the spec's dtype.
    s13, s2 (float32; None without quantization):
      fp8_block    [e, (2 or 1)·ceil(i/128), ceil(H/128)], gate's blocks before up's; [e, ceil(H/128), ceil(i/128)]
      fp8_tensor_* [e, 2 or 1] (gate, up); [e, 1]
      fp8_channel  [e, F]; [e, H]
    a13 (scalar), a2 [e] (float32): static activation scales of the two GEMMs, for fp8_tensor_static only. a13 is the
    maximum over all experts of the layer, so that every rank quantizes a row alike.
    token_gate_eH (float32), of a gated shared expert only: y is multiplied by sigmoid(token_gate · x).
    b13_eF, b2_eH (float32), of experts with biases only: b13's values stand as the rows of w13 do. b2 is in the slice
    that begins at column 0, and zeros are in all others, so that it counts once in the sum of an expert's slices.
    """

    kind: QuantKind
    gated: bool
    w13_eFH: Tensor
    w2_eHi: Tensor
    s13: Tensor | None = None
    s2: Tensor | None = None
    a13: Tensor | None = None
    a2: Tensor | None = None
    token_gate_eH: Tensor | None = None
    b13_eF: Tensor | None = None
    b2_eH: Tensor | None = None
    gate_first: bool = True

    @staticmethod
    def forms(spec: MoESpec, experts: int, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and dtype of every tensor that `experts` experts of `spec` with `width` columns have."""
        H, F = spec.hidden, spec.w13_rows(width)
        dtype = FP8 if spec.quantized else spec.torch_dtype
        found = {"w13_eFH": ((experts, F, H), dtype), "w2_eHi": ((experts, H, width), dtype)}
        scales: dict[str, tuple[int, ...]] = {}
        if spec.quant == "fp8_block":
            of_width, of_hidden = cdiv(width, BLOCK), cdiv(H, BLOCK)
            scales = {"s13": (experts, spec.w13_rows(of_width), of_hidden), "s2": (experts, of_hidden, of_width)}
        elif spec.quant == "fp8_channel":
            scales = {"s13": (experts, F), "s2": (experts, H)}
        elif spec.quantized:
            scales = {"s13": (experts, spec.w13_rows(1)), "s2": (experts, 1)}
        if spec.quant == "fp8_tensor_static":
            scales |= {"a13": (), "a2": (experts,)}
        if spec.token_gate:
            scales |= {"token_gate_eH": (experts, H)}
        if spec.expert_bias:
            scales |= {"b13_eF": (experts, F), "b2_eH": (experts, H)}
        return found | {name: (shape, torch.float32) for name, shape in scales.items()}

    @classmethod
    def bytes_of(cls, spec: MoESpec, experts: int, width: int, scales: bool = True) -> int:
        """Bytes of these tensors, or without `scales` (and biases, which are as small) of the two matrices alone."""
        forms = cls.forms(spec, experts, width)
        counted = forms.values() if scales else (forms["w13_eFH"], forms["w2_eHi"])
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in counted)

    @classmethod
    def empty(cls, spec: MoESpec, experts: int, width: int, device: torch.device | str) -> ExpertWeights:
        """These tensors, to be filled; on `meta` nothing but their shapes."""
        forms = cls.forms(spec, experts, width)
        made: dict[str, Any] = {
            name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in forms.items()
        }
        return cls(spec.quant, spec.gated, **made)

    @property
    def num_experts(self) -> int:
        return self.w13_eFH.shape[0]

    @property
    def hidden(self) -> int:
        return self.w13_eFH.shape[2]

    @property
    def width(self) -> int:
        """i, this shard's slice of the intermediate size."""
        return self.w2_eHi.shape[2]

    @property
    def device(self) -> torch.device:
        return self.w13_eFH.device

    @property
    def biases(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: tensor for name, tensor in self.tensors().items() if name in ("b13_eF", "b2_eH")}

    def tensors(self) -> dict[str, Tensor]:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in named if isinstance(value, Tensor)}

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def fingerprint(self) -> dict[str, Any]:
        """Each tensor's shape and a sum of its bytes in which every eight of them count by what they are and where they
        stand, in the canonical order [gate; up] whatever `gate_first` says: tells other weights, and the same ones in
        another order, apart. Plain data, the same on every device. A few passes over the weights."""
        found = {}
        for name, tensor in self.tensors().items():
            turned = self.gated and not self.gate_first and name in OF_HALVES
            found[name] = [list(tensor.shape), position_sum(tensor, turned)]
        return found

    def one(self, slot: int) -> ExpertWeights:
        """The expert in `slot` alone, as views."""
        tensors = self.tensors().items()
        return self.with_tensors(**{name: each[slot : slot + 1] for name, each in tensors if each.ndim})

    def with_tensors(self, **tensors: Any) -> ExpertWeights:
        """Another object with these tensors instead of its own; the rest is shared, so don't `turn` both."""
        return replace(self, **tensors)

    def to(self, device: torch.device | str) -> ExpertWeights:
        """On `device`; this very object if it is there already, so that two objects never share what `turn` turns."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return self if moved["w13_eFH"] is self.w13_eFH else self.with_tensors(**moved)

    def turn(self, gate_first: bool) -> None:
        """Swap gate and up in place, expert by expert, if they are not in this order yet: for a backend that reads
        [up; gate], without a second copy. Whoever shares this object sees the new order in `gate_first`."""
        if not self.gated or gate_first == self.gate_first:
            return
        with torch.inference_mode():  # weights that were made in it may be changed in it only
            self._turn(gate_first)

    def _turn(self, gate_first: bool) -> None:
        for name in OF_HALVES:
            tensor = getattr(self, name)
            if tensor is None:
                continue
            for expert in tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor:
                expert.copy_(torch.cat(expert.chunk(2)[::-1]))
        self.gate_first = gate_first

    def check_finite(self, experts: Sequence[int] | None = None) -> None:
        """Raise ConfigError if a weight or scale is NaN, infinite or so large that results overflow, a scale not
        positive, or a matrix of an expert all zeros, which is how weights that were never written look. `experts`:
        their numbers in the layer, for the message; slots without. One pass over all weights, expert by expert to need
        little memory."""
        for name, tensor in self.tensors().items():
            if name[0] in "sa" and not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
                rule = "scales must be finite and positive"
                raise ConfigError(f"weights.{name}", "NaN, infinite or not positive", rule)
            if name[0] == "s" and tensor.numel() and (largest := float(tensor.max())) > LARGEST_SCALE:
                raise ConfigError(f"weights.{name}", largest, "results overflow", f"scales up to {LARGEST_SCALE:.3g}")
        for name, bias in self.biases.items():  # zeros are fine
            if not bool((bias.abs() <= LARGEST_WEIGHT).all()):
                rule = "a bias must be finite, and results overflow with a larger one"
                raise ConfigError(f"weights.{name}", float(bias.abs().max()), rule, f"up to {LARGEST_WEIGHT:.3g}")
        for slot in range(self.num_experts):
            number = slot if experts is None else experts[slot]
            if self.token_gate_eH is not None:
                _check_matrix("weights.token_gate_eH", number, self.token_gate_eH[slot])
            halves = self.w13_eFH[slot].chunk(2 if self.gated else 1)
            for name, matrix in [*(("w13_eFH", half) for half in halves), ("w2_eHi", self.w2_eHi[slot])]:
                if matrix.numel():
                    _check_matrix(f"weights.{name}", number, matrix)

    def dequantized(self, slot: int) -> tuple[Tensor, Tensor]:
        """One expert in float32: w13 [F, H] with [gate; up] rows whatever the stored order, w2 [H, i]."""
        w13, w2 = self._scaled(slot)
        return (w13 if self.gate_first else torch.cat(w13.chunk(2)[::-1])), w2

    def first_bias(self, slot: int) -> Tensor | None:
        """One expert's bias of w13 [F] in the order of `dequantized`; None where it has none."""
        if self.b13_eF is None:
            return None
        bias_F = self.b13_eF[slot]
        return bias_F if self.gate_first else torch.cat(bias_F.chunk(2)[::-1])

    def _scaled(self, slot: int) -> tuple[Tensor, Tensor]:
        w13, w2 = self.w13_eFH[slot].float(), self.w2_eHi[slot].float()
        if self.s13 is None or self.s2 is None:
            return w13, w2
        (F, H), i, s13, s2 = w13.shape, self.width, self.s13[slot], self.s2[slot]
        if self.kind == "fp8_block":
            halves = [expand_blocks(half, i, H) for half in s13.chunk(2 if self.gated else 1)]
            return w13 * torch.cat(halves), w2 * expand_blocks(s2, H, i)
        if self.kind == "fp8_channel":
            return w13 * s13[:, None], w2 * s2[:, None]
        return w13 * s13.repeat_interleave(i)[:F, None], w2 * s2


def position_sum(tensor: Tensor, turned: bool = False) -> int:
    """A sum of the bytes of a tensor [e, ...] in which every eight of them count by what they are and where they stand.
    `turned`: each expert's halves count as if they stood the other way round. It goes piece by piece, because it needs
    several times a piece's memory, and the host waits for a GPU."""
    total = 0
    if not tensor.numel():
        return total
    experts = tensor.reshape(1, 1) if tensor.ndim == 0 else tensor
    step = max(1, PIECE // experts[0].nbytes)
    for first in range(0, len(experts), step):
        piece = experts[first : first + step]
        count = len(piece)
        if turned:
            piece = torch.cat((piece.view(torch.uint8) if piece.itemsize == 1 else piece).chunk(2, 1)[::-1], 1)
        codes = piece.contiguous().view(count, -1).view(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
        words = codes.contiguous().view(torch.int64).flatten()
        start = first * (len(words) // count)
        places = torch.arange(start, start + len(words), dtype=torch.int64, device=words.device)
        mixed = places.mul_(MIXERS[0]).bitwise_xor_(words).mul_(MIXERS[1])
        total += int((mixed >> 32).bitwise_xor_(mixed).sum())
    return total % (1 << 64)


def _check_matrix(field: str, expert: int, matrix: Tensor) -> None:
    if matrix.dtype.itemsize == 1:  # E4M3 has two codes for NaN, 0x7F and 0xFF, two for zero, and none for infinity
        largest = float((matrix.view(torch.uint8) & 0x7F).max())
        finite = largest < 0x7F
    else:
        largest = float(matrix.abs().max())  # NaN if there is one
        finite = largest < float("inf")
    if not finite:
        raise ConfigError(field, "NaN or infinite", f"weights must be finite, those of expert {expert} are not")
    if matrix.dtype.itemsize > 1 and largest > LARGEST_WEIGHT:
        rule = f"results overflow with expert {expert}"
        raise ConfigError(field, largest, rule, f"weights up to {LARGEST_WEIGHT:.3g}")
    if largest == 0:
        raise ConfigError(field, "all zeros", f"expert {expert} was not loaded")


@unaffected
def quantize_weights(w13_eFH: Tensor, w2_eHi: Tensor, spec: MoESpec) -> ExpertWeights:
    """Dense weights to the spec's format, without static activation scales and biases. Gate and up get scales of their
    own."""
    if not spec.quantized:
        dtype = spec.torch_dtype
        return ExpertWeights(spec.quant, spec.gated, w13_eFH.to(dtype), w2_eHi.to(dtype))
    halves = w13_eFH.chunk(2 if spec.gated else 1, dim=1)
    if spec.quant == "fp8_block":
        parts = [quantize_blocks(half) for half in halves]
        codes2, s2 = quantize_blocks(w2_eHi)
    elif spec.quant == "fp8_channel":
        parts = [_quantize_over(half, (-1,)) for half in halves]
        codes2, s2 = _quantize_over(w2_eHi, (-1,))
    else:
        parts = [_quantize_over(half, (-2, -1)) for half in halves]
        codes2, s2 = _quantize_over(w2_eHi, (-2, -1))
    codes13 = torch.cat([codes for codes, _ in parts], 1)
    return ExpertWeights(spec.quant, spec.gated, codes13, codes2, torch.cat([scales for _, scales in parts], 1), s2)


def _quantize_over(values: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    scales = scale_of(values.abs().amax(dims, keepdim=True))
    return cast(values, scales), scales.flatten(1)


@unaffected
def slice_width(weights: ExpertWeights, start: int, stop: int) -> ExpertWeights:
    """Columns [start, stop) of the intermediate size: rows of gate and of up, columns of w2, and their scales.

    `start` lies on a block boundary for fp8_block (the slice rules see to that). A per-tensor or per-channel scale is
    the whole matrix's: a slice keeps it. b2 goes to the slice that begins at column 0.
    """
    halves = 2 if weights.gated else 1

    def rows(tensor: Tensor, first: int, last: int) -> Tensor:
        return torch.cat([half[:, first:last] for half in tensor.chunk(halves, 1)], 1)

    changes = {"w13_eFH": rows(weights.w13_eFH, start, stop), "w2_eHi": weights.w2_eHi[:, :, start:stop].contiguous()}
    if weights.s13 is not None and weights.s2 is not None:
        if weights.kind == "fp8_block":
            first = start // BLOCK
            last = first + cdiv(stop - start, BLOCK)  # none for an empty slice behind a partial block
            changes |= {"s13": rows(weights.s13, first, last), "s2": weights.s2[:, :, first:last].contiguous()}
        elif weights.kind == "fp8_channel":
            changes |= {"s13": rows(weights.s13, start, stop)}
    if weights.b13_eF is not None and weights.b2_eH is not None:
        changes |= {"b13_eF": rows(weights.b13_eF, start, stop)}
        changes |= {} if start == 0 else {"b2_eH": torch.zeros_like(weights.b2_eH)}
    return weights.with_tensors(**changes)


@unaffected
def stack(experts: Sequence[ExpertWeights]) -> ExpertWeights:
    """Concatenate along the expert dimension. Scalars (a13) must be the same everywhere and stay as they are."""
    first = experts[0]
    for expert in experts:
        if expert.gate_first != first.gate_first:
            raise ConfigError(
                "weights.gate_first", expert.gate_first, "all parts must be in one order", first.gate_first
            )
        if expert.a13 is not None and first.a13 is not None and expert.a13 != first.a13:
            rule = "the input scale is one for all experts of a layer"
            raise ConfigError("weights.a13", float(expert.a13), rule, float(first.a13))
    joined = {
        name: torch.cat([getattr(expert, name) for expert in experts]) if tensor.ndim else tensor
        for name, tensor in first.tensors().items()
    }
    return first.with_tensors(**joined)


def empty_like(weights: ExpertWeights) -> ExpertWeights:
    """No expert at all, in the format of `weights`: the shard of a rank that holds none."""
    return weights.with_tensors(**{name: tensor[:0] for name, tensor in weights.tensors().items() if tensor.ndim})


@unaffected
def shard(weights: ExpertWeights, placement: Placement, rank: int) -> ExpertWeights:
    """What `rank` holds of a whole layer."""
    held = torch.tensor(placement.experts_of(rank), dtype=torch.int64, device=weights.device)
    picked = {name: tensor[held] for name, tensor in weights.tensors().items() if tensor.ndim}
    return slice_width(weights.with_tensors(**picked), *placement.slice_of(rank))


@unaffected
def shard_from(
    make_expert: Callable[[int], ExpertWeights], placement: Placement, rank: int, seen: Callable[[], None] | None = None
) -> ExpertWeights:
    """`rank`'s shard from a function that makes one whole expert at a time: the whole layer never exists at once."""
    start, stop = placement.slice_of(rank)
    parts = []
    for expert in placement.experts_of(rank):
        parts.append(slice_width(make_expert(expert), start, stop))
        if seen:
            seen()
    return stack(parts) if parts else empty_like(slice_width(make_expert(0), start, stop))


def activate(gate_up_RF: Tensor, activation: str) -> Tensor:
    """[R, F] with [gate, up] columns to [R, i], in the input's dtype.

    swiglu: silu(gate) · up (arXiv 2002.05202). geglu: gelu(gate) · up with the tanh form, as Gemma has it.
    relu2: relu(x)², not gated (Nemotron-H; arXiv 2109.08668). swigluoai: gate · sigmoid(1.702 gate) · (up + 1), with
    gate clamped to at most 7 and up to ±7 before (gpt-oss; modeling_gpt_oss.py of transformers, named as in vLLM).
    """
    if activation == "relu2":
        return gate_up_RF.relu().square()
    gate, up = gate_up_RF.chunk(2, dim=-1)
    if activation == "swiglu":
        return torch.nn.functional.silu(gate) * up
    if activation == "swigluoai":
        gate, up = gate.clamp(max=OAI_LIMIT), up.clamp(-OAI_LIMIT, OAI_LIMIT)
        return gate * torch.sigmoid(OAI_ALPHA * gate) * (up + 1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
