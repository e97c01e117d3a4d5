"""Where the tensors of one MoE layer lie on disk, and what their headers must say.

Two forms are known. One by one: experts.E.{gate_proj, up_proj}.weight [I, H] and down_proj.weight [H, I], each with a
weight_scale_inv of one number per 128×128 block if quantized (DeepSeek-V3's FP8 form; the scale multiplies, whatever
its name says). Fused, as transformers 5 has them in memory: experts.gate_up_proj [E, 2I, H], gate's rows first, and
experts.down_proj [E, H, I], with gate_up_proj_scale_inv and down_proj_scale_inv. A shared expert is never fused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import replace as with_fields
from functools import cached_property
from pathlib import Path

from moe_dist.checkpoint.config import ModelConfig
from moe_dist.checkpoint.folder import plain
from moe_dist.checkpoint.quantization import PROJECTIONS
from moe_dist.checkpoint.reader import Checkpoint, TensorFormat
from moe_dist.errors import CheckpointError, ConfigError, UnsupportedError
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import BLOCK, MoESpec

ROUTER_DTYPES = ("F32", "BF16")  # as safetensors headers spell them
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
WEIGHT_DTYPES = {"bf16": "BF16", "fp32": "F32", "fp8_block": "F8_E4M3"}
FORMATS = {dtype: label for label, dtype in WEIGHT_DTYPES.items()}
OF_THE_MLP = re.compile(r"mlp|moe|expert|gate|router|ffn|feed_forward", re.IGNORECASE)
ATTENTION = re.compile(r"(self_|linear_)?attn\.")

Source = Checkpoint | Path | str


@dataclass(frozen=True)
class Piece:
    """The weights or the scales of one projection of one expert: [I, H], or [H, I] for down_proj, in blocks for scales.
    Fused: `expert` is its place in the first dimension, `first_row` where the projection's rows begin."""

    tensor: TensorFormat
    projection: str
    scale: bool
    expert: int | None = None
    first_row: int = 0

    def whole(self) -> tuple[slice, ...]:
        """The index of all columns of the expert's weights."""
        down = self.projection == "down_proj"
        width = self.tensor.shape[-1 if down else -2]
        return self.part(0, width if down or self.expert is None else width // 2)

    def part(self, start: int, stop: int) -> tuple[slice, ...]:
        """The index of columns [start, stop) of the expert's width."""
        if self.scale:
            start, stop = start // BLOCK, cdiv(stop, BLOCK)
        rows, columns = slice(self.first_row + start, self.first_row + stop), slice(None)
        if self.projection == "down_proj":
            rows, columns = columns, slice(start, stop)
        return (rows, columns) if self.expert is None else (slice(self.expert, self.expert + 1), rows, columns)


@dataclass(frozen=True)
class Layer:
    """One MoE layer of a checkpoint. Raises as `Checkpoint` does; `open_layer` makes it."""

    checkpoint: Checkpoint
    number: int

    @property
    def _mlp(self) -> str:
        return f"model.layers.{self.number}.mlp"

    def _concerned(self, name: str) -> bool:
        """Whether a tensor may belong to this layer's router or experts, under whatever prefix. Layers that predict
        further tokens have numbers of their own."""
        numbered = f"layers.{self.number}."
        if numbered not in name:
            return False
        before, _, after = name.partition(numbered)
        parts = before.split(".")
        return not parts[-1] and "mtp" not in parts and not ATTENTION.match(after) and bool(OF_THE_MLP.search(after))

    @cached_property
    def fused(self) -> bool:
        """CheckpointError if some experts are fused and others are not."""
        names, prefix = self.checkpoint.files, f"{self._mlp}.experts"
        fused = f"{prefix}.gate_up_proj" in names
        alone = f"{prefix}.0.gate_proj.weight"
        if fused and alone in names:
            problem = f"tensors {prefix}.gate_up_proj and {alone} are both there: which of them counts is not said"
            raise CheckpointError(self.checkpoint.directory, problem)
        return fused

    @cached_property
    def spec(self) -> MoESpec:
        """The layer as its files say: what config.json makes of it, or, where that leaves its dtype open, the dtype of
        its tensors. CheckpointError names both where they contradict each other."""
        config = self.checkpoint.config
        said = config.layer_spec(self.number)
        name = f"{self._mlp}.experts.gate_up_proj" if self.fused else f"{self._mlp}.experts.0.gate_proj.weight"
        self.checkpoint.require([name])
        dtype, _ = self.checkpoint.header(name)
        path = self.checkpoint.path_of(name)
        if dtype not in FORMATS:
            raise UnsupportedError(
                f"dtype {dtype} of tensor {name} in {path}", ["nothing here computes it"], tuple(FORMATS)
            )
        found = FORMATS[dtype]
        if found != said.quant_label and (said.quantized or found == "fp8_block" or config.dtype is not None):
            raise CheckpointError(path, f"tensor {name} has dtype {dtype}, but {self._reason(said)}")
        if said.quantized and self.fused and said.intermediate % BLOCK:
            reason = f"intermediate {said.intermediate} is no multiple of {BLOCK}: a block of scales holds gate and up"
            raise UnsupportedError(f"fused experts {name} in {path}", [reason])
        self._refuse_strangers(said)
        return said if said.quantized else said.with_changes(dtype=found)

    def _refuse_strangers(self, spec: MoESpec) -> None:
        """CheckpointError for tensors of the layer that nothing here reads: biases, further scales, more experts. To
        leave them out would give other numbers than the model's."""
        weight = r"(gate|up|down)_proj\.weight"
        scale = "(_scale_inv)?" if spec.quantized else ""
        alone = rf"experts\.(?P<expert>0|[1-9][0-9]*)\.{weight}{scale}"
        routed = rf"experts\.(gate_up|down)_proj{scale}" if self.fused else alone
        bias = "|gate.e_score_correction_bias" if spec.correction_bias else ""
        shared = rf"|shared_experts\.{weight}(_scale_inv)?" if spec.shared_intermediate else ""
        known = re.compile(rf"{re.escape(self._mlp)}\.({routed}|gate\.weight{bias}{shared})")
        strange = []
        for name in filter(self._concerned, self.checkpoint.files):
            match = known.fullmatch(name)
            expert = match.groupdict().get("expert") if match else None
            if not match or (expert is not None and int(expert[:9]) >= spec.num_experts):
                strange.append(name)
        if strange:
            listed = ", ".join(map(plain, sorted(strange)[:3])) + (", ..." if len(strange) > 3 else "")
            problem = f"layer {self.number} has tensors that nothing here reads: {listed}"
            raise CheckpointError(self.checkpoint.directory, problem)

    def refuse_strays(self) -> None:
        """CheckpointError for tensors of the layer that lie where nothing reads them: which of two copies counts, or
        whether one counts at all, libraries decide each their own way."""
        strays = self.checkpoint.strays(self._concerned)
        if strays:
            name, file = strays[0]
            read = self.checkpoint.files.get(name)
            rule = f"and is read from {plain(read)}" if read else "which no index names for it, and is not read"
            more = f" (and {len(strays) - 1} more like it)" if len(strays) > 1 else ""
            raise CheckpointError(self.checkpoint.directory, f"tensor {plain(name)} lies in {plain(file)} {rule}{more}")

    def _reason(self, said: MoESpec) -> str:
        """Why the layer was expected to have the format of `said`."""
        config = self.checkpoint.config
        if quantization := config.quantization_of(self.number):
            return f"{quantization.where} makes this layer {WEIGHT_DTYPES[said.quant_label]} (no list takes it out)"
        if config.quantizations:
            return f"{config.quantizations[0].where} lists this layer as not converted ({said.quant_label})"
        return f"{config.path} has no quantization_config and says {said.quant_label}"

    def router(self) -> list[TensorFormat]:
        spec = self.checkpoint.config.spec
        tensors = [TensorFormat(f"{self._mlp}.gate.weight", (spec.num_experts, spec.hidden), ROUTER_DTYPES)]
        if spec.correction_bias:
            name = f"{self._mlp}.gate.e_score_correction_bias"
            tensors.append(TensorFormat(name, (spec.num_experts,), ROUTER_DTYPES))
        return tensors

    def expert(self, expert: int) -> list[Piece]:
        """gate, up and down, each followed by its scales if there are any."""
        if not self.fused:
            return _alone(f"{self._mlp}.experts.{expert}", self.spec, self.spec.intermediate)
        spec, pieces = self.spec, []
        E, H, I = spec.num_experts, spec.hidden, spec.intermediate
        for projection in PROJECTIONS:
            down = projection == "down_proj"
            name, shape = (
                f"{self._mlp}.experts.{'down_proj' if down else 'gate_up_proj'}",
                (H, I) if down else (2 * I, H),
            )
            for scale in (False, True) if spec.quantized else (False,):
                rows = 0 if projection != "up_proj" else I // BLOCK if scale else I
                tensor = _format(name + ("_scale_inv" if scale else ""), shape, spec, scale)
                tensor = with_fields(tensor, shape=(E, *tensor.shape))
                pieces.append(Piece(tensor, projection, scale, expert, rows))
        return pieces

    def shared_expert(self) -> list[Piece]:
        """Like `expert`. ConfigError for a model without one, UnsupportedError for one of another format than the
        routed experts have."""
        spec = self.spec
        if spec.shared_intermediate < 1:
            raise ConfigError("model.shared_intermediate", 0, f"{self.checkpoint.directory} has no shared expert")
        pieces = _alone(f"{self._mlp}.shared_experts", spec, spec.shared_intermediate)
        self.checkpoint.require([pieces[0].tensor.name])
        found, _ = self.checkpoint.header(pieces[0].tensor.name)
        wanted = pieces[0].tensor.dtypes
        if found not in wanted and found in FORMATS:
            what = f"the shared expert of layer {self.number} of {self.checkpoint.directory} in {found}"
            raise UnsupportedError(what, ["it must have the format of the routed experts"], wanted)
        return pieces

    def check(self, tensors: Iterable[TensorFormat]) -> None:
        """CheckpointError unless all are there, each in its shape and dtype. Reads headers only."""
        wanted = {tensor.name: tensor for tensor in tensors}
        self.checkpoint.require(wanted)
        for tensor in wanted.values():
            self.checkpoint.expect(tensor)


def open_layer(source: Source, layer: int) -> Layer:
    """Raises ConfigError for a layer without experts."""
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    checkpoint.config.require_moe_layer(layer)
    return Layer(checkpoint, layer)


def layer_spec(source: Source, layer: int) -> MoESpec:
    """The spec of one layer, its format as the layer's own tensors and the model's files say. A folder without any
    weights is taken at its config.json's word: a plan needs no more. Of others, the headers of the router and of the
    first and the last expert must fit; `check_layer` looks at all. Raises CheckpointError (files or tensors missing,
    damaged or contradictory), UnsupportedError (a format that is not read) or ConfigError (no such MoE layer)."""
    found = open_layer(source, layer)
    if not found.checkpoint.holds_weights:
        return found.checkpoint.config.layer_spec(layer)
    ends = [*found.expert(0), *found.expert(found.spec.num_experts - 1)]
    found.check([*found.router(), *(piece.tensor for piece in ends)])
    found.refuse_strays()
    return found.spec


def check_layer(source: Source, layer: int, shared: bool = False) -> ModelConfig:
    """Raise CheckpointError unless every tensor of the layer's router and experts (and shared expert, if `shared`) is
    there in the right shape and dtype, in files that are not truncated. Reads headers only: milliseconds per file.
    Gives the model's config with the spec of this very layer."""
    found = open_layer(source, layer)
    pieces = [piece for expert in range(found.spec.num_experts) for piece in found.expert(expert)]
    if shared:
        pieces += found.shared_expert()
    found.check([*found.router(), *(piece.tensor for piece in pieces)])
    found.refuse_strays()
    return with_fields(found.checkpoint.config, spec=found.spec)


def _alone(prefix: str, spec: MoESpec, intermediate: int) -> list[Piece]:
    pieces = []
    for projection in PROJECTIONS:
        shape = (spec.hidden, intermediate) if projection == "down_proj" else (intermediate, spec.hidden)
        name = f"{prefix}.{projection}.weight"
        pieces.append(Piece(_format(name, shape, spec, False), projection, False))
        if spec.quantized:
            pieces.append(Piece(_format(f"{name}_scale_inv", shape, spec, True), projection, True))
    return pieces


def _format(name: str, shape: tuple[int, ...], spec: MoESpec, scale: bool) -> TensorFormat:
    """Of a matrix of this shape, or of its blocks' scales."""
    if scale:
        return TensorFormat(name, tuple(cdiv(size, BLOCK) for size in shape), SCALE_DTYPES)
    return TensorFormat(name, shape, (WEIGHT_DTYPES[spec.quant_label],))
