"""The tensors of one expert on disk, and which part of each belongs to a slice of the expert's width."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_dist.checkpoint.names import FUSED, Matrix, Names
from moe_dist.checkpoint.reader import TensorFormat
from moe_dist.checkpoint.scheme import Grain, Scheme
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import BLOCK, MoESpec

SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")  # as safetensors headers spell them
WEIGHT_DTYPES = {"bf16": "BF16", "fp32": "F32"}
FP8_DTYPE = "F8_E4M3"


@dataclass(frozen=True)
class Piece:
    """One matrix of one expert, or its scales if `scale` says what has one. `width` is the expert's.
    Fused: `expert` is its place in the first dimension, `first` where the matrix begins along the width, and
    `transposed` matrices lie as [K, N]."""

    tensor: TensorFormat
    matrix: Matrix
    width: int
    scale: Grain | None = None
    expert: int | None = None
    first: int = 0
    transposed: bool = False

    def whole(self) -> tuple[slice, ...]:
        """The index of all columns of the expert's width."""
        return self.part(0, self.width)

    def part(self, start: int, stop: int) -> tuple[slice, ...]:
        """The index of columns [start, stop) of the expert's width; empty for a number that all share."""
        if self.scale == "tensor":
            return ()
        if self.scale == "block":
            start, stop = start // BLOCK, cdiv(stop, BLOCK)
        of_width, every = slice(self.first + start, self.first + stop), slice(None)
        down = self.matrix == "down"
        if self.scale == "channel":
            return (every,) if down else (of_width,)
        index = (every, of_width) if down != self.transposed else (of_width, every)
        return index if self.expert is None else (slice(self.expert, self.expert + 1), *index)

    def canonical(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What was read by such an index, in the `shape` that it has in ExpertWeights."""
        if self.scale in ("channel", "tensor"):
            return values.reshape(-1).expand(shape)
        matrix = values if self.expert is None else values[0]
        return matrix.T if self.transposed else matrix


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
