"""The tensors of one expert on disk, and which part of each belongs to a slice of the expert's width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.checkpoint.mxfp4 import BLOCKS, BYTES, GROUP, SCALES, unpacked
from moe_dist.checkpoint.names import FUSED, Matrix, Names, Part
from moe_dist.checkpoint.reader import TensorFormat
from moe_dist.checkpoint.scheme import Grain, Scheme
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import BLOCK, MoESpec

SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")  # as safetensors headers spell them
WEIGHT_DTYPES = {"bf16": "BF16", "fp32": "F32"}
FP8_DTYPE = "F8_E4M3"
BIAS, BIAS_DTYPES = "_bias", ("F32", "BF16")
BYTE = ("U8",)


@dataclass(frozen=True)
class Piece:
    """One matrix of one expert, its scales if `scale` says what has one, or its `bias`. `width` is the expert's.
    Fused: `expert` is its place in the first dimension, `first` where the matrix begins along the width, and
    `transposed` matrices lie as [K, N]. `both` are gate and up in turns, of which two rows are one of the width.
    `packed`: the exponents of a matrix in MXFP4, whose tensor holds its bytes."""

    tensor: TensorFormat
    matrix: Part
    width: int
    scale: Grain | None = None
    expert: int | None = None
    first: int = 0
    transposed: bool = False
    bias: bool = False
    packed: TensorFormat | None = None

    def part(self, start: int, stop: int) -> tuple[slice, ...]:
        """The index of columns [start, stop) of the expert's width; empty for a number that all share."""
        if self.scale == "tensor":
            return ()
        if self.scale == "block":
            start, stop = start // BLOCK, cdiv(stop, BLOCK)
        each = 2 if self.matrix == "both" else 1
        of_width, every = slice(self.first + each * start, self.first + each * stop), slice(None)
        down = self.matrix == "down"
        if self.packed and down:
            of_width = slice(start // GROUP, cdiv(stop, GROUP))
        index: tuple[slice, ...]
        if self.scale == "channel" or self.bias:
            index = (every,) if down else (of_width,)
        else:
            index = (every, of_width) if down != self.transposed else (of_width, every)
        return index if self.expert is None else (slice(self.expert, self.expert + 1), *index)

    @property
    def tensors(self) -> list[TensorFormat]:
        """Its own, and what is needed beside it."""
        return [self.tensor, self.packed] if self.packed else [self.tensor]

    def values(self, read: Callable[..., Tensor], start: int, stop: int) -> Tensor:
        """What `read` gives of columns [start, stop)."""
        index = self.part(start, stop)
        values = read(self.tensor.name, *index)
        if not self.packed:
            return values
        dense = unpacked(values, read(self.packed.name, *index))
        skipped = start % GROUP  # a slice may begin and end within a group
        return dense[..., skipped : skipped + stop - start] if self.matrix == "down" else dense

    def canonical(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Such `values`, in the `shape` that they have in ExpertWeights."""
        if self.scale in ("channel", "tensor"):
            return values.reshape(-1).expand(shape)
        matrix = values if self.expert is None else values[0]
        matrix = matrix.T if self.transposed else matrix
        return torch.cat([matrix[0::2], matrix[1::2]]) if self.matrix == "both" else matrix

    def halves(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """Gate and up, where it holds both as `canonical` gives them."""
        return matrix.chunk(2) if self.matrix == "both" else (matrix,)


def alone(prefix: str, names: Names, spec: MoESpec, width: int, scheme: Scheme | None) -> list[Piece]:
    """Of an expert that is a module of its own: each matrix, followed by its scales if there are any."""
    pieces = []
    for matrix, module in names.matrices.items():
        shape = _shape(matrix, spec.hidden, width)
        name = f"{prefix}.{module}.weight"
        pieces.append(Piece(TensorFormat(name, shape, _weight_dtypes(spec)), matrix, width))
        if scheme:
            scales = _scales(f"{name}{scheme.suffix}", shape, scheme.grain)
            pieces.append(Piece(scales, matrix, width, scheme.grain))
    return pieces


def fused(
    prefix: str, names: Names, spec: MoESpec, expert: int, scheme: Scheme | None, transposed: bool
) -> list[Piece]:
    """Likewise of an expert that lies in one tensor with the others. Scales are those of blocks."""
    E, H, I = spec.num_experts, spec.hidden, spec.intermediate
    pieces = []
    for matrix in names.matrices:
        name = f"{prefix}.{FUSED[matrix]}"
        shape = _shape(matrix, H, I if matrix == "down" else 2 * I)
        first = I if matrix == "up" else 0
        stored = TensorFormat(name, (E, *(shape[::-1] if transposed else shape)), _weight_dtypes(spec))
        pieces.append(Piece(stored, matrix, I, None, expert, first, transposed))
        if scheme:
            scales = _scales(f"{name}{scheme.suffix}", shape, scheme.grain)
            stored = TensorFormat(scales.name, (E, *scales.shape), scales.dtypes)
            pieces.append(Piece(stored, matrix, I, scheme.grain, expert, first // BLOCK))
    return pieces


def interleaved(prefix: str, spec: MoESpec, expert: int, packed: bool) -> list[Piece]:
    """Likewise of an expert whose gate and up lie in turns, with the biases of both matrices. The matrices are
    transposed or, in MXFP4, `packed` row by row."""
    E, H, I = spec.num_experts, spec.hidden, spec.intermediate
    pieces = []
    parts: tuple[tuple[Part, str, tuple[int, int]], ...] = (
        ("both", FUSED["gate"], (H, 2 * I)), ("down", FUSED["down"], (I, H)),
    )  # fmt: skip
    for part, module, shape in parts:
        if packed:
            groups = (E, shape[1], shape[0] // GROUP)
            stored = TensorFormat(f"{prefix}.{module}{BLOCKS}", (*groups, BYTES), BYTE)
            exponents = TensorFormat(f"{prefix}.{module}{SCALES}", groups, BYTE)
            pieces.append(Piece(stored, part, I, None, expert, packed=exponents))
        else:
            stored = TensorFormat(f"{prefix}.{module}", (E, *shape), _weight_dtypes(spec))
            pieces.append(Piece(stored, part, I, None, expert, transposed=True))
        bias = TensorFormat(f"{prefix}.{module}{BIAS}", (E, shape[1]), BIAS_DTYPES)
        pieces.append(Piece(bias, part, I, None, expert, bias=True))
    return pieces


def input_scale(prefix: str, module: str) -> TensorFormat:
    """One number, the static scale of a matrix's input rows."""
    return TensorFormat(f"{prefix}.{module}.input_scale", (), SCALE_DTYPES, ((1,),))


def _shape(matrix: Matrix, hidden: int, width: int) -> tuple[int, int]:
    return (hidden, width) if matrix == "down" else (width, hidden)


def _weight_dtypes(spec: MoESpec) -> tuple[str, ...]:
    return (FP8_DTYPE if spec.quantized else WEIGHT_DTYPES[spec.dtype],)


def _scales(name: str, shape: tuple[int, int], grain: Grain) -> TensorFormat:
    if grain == "block":
        return TensorFormat(name, (cdiv(shape[0], BLOCK), cdiv(shape[1], BLOCK)), SCALE_DTYPES)
    if grain == "channel":
        return TensorFormat(name, (shape[0], 1), SCALE_DTYPES, ((shape[0],),))
    return TensorFormat(name, (), SCALE_DTYPES, ((1,),))
