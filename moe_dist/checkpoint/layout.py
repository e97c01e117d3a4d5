"""Where the tensors of one MoE layer lie on disk, and what their headers must say.

Experts lie one by one, as modules experts.E, or fused, all of a layer in one tensor (`names.py` has both). Fused ones
are bf16, float32 or FP8 in blocks of 128×128. A shared expert is never fused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from dataclasses import replace as with_fields
from functools import cached_property
from pathlib import Path

from moe_dist.checkpoint.config import ModelConfig
from moe_dist.checkpoint.folder import plain
from moe_dist.checkpoint.mxfp4 import BLOCKS, GROUP, SCALES
from moe_dist.checkpoint.names import FUSED, Names
from moe_dist.checkpoint.pieces import BIAS, FP8_DTYPE, WEIGHT_DTYPES, Piece, alone, fused, input_scale, interleaved
from moe_dist.checkpoint.reader import Checkpoint, TensorFormat
from moe_dist.checkpoint.scheme import MXFP4, Scheme
from moe_dist.errors import CheckpointError, ConfigError, UnsupportedError
from moe_dist.model.spec import BLOCK, MoESpec, QuantKind

ROUTER_DTYPES = ("F32", "BF16")  # as safetensors headers spell them
FORMATS = {dtype: label for label, dtype in WEIGHT_DTYPES.items()} | {FP8_DTYPE: "fp8"}
OF_THE_MLP = re.compile(r"mlp|moe|expert|gate|router|ffn|feed_forward|mixer", re.IGNORECASE)
ATTENTION = re.compile(r"(self_|linear_)?attn\.")

Source = Checkpoint | Path | str


@dataclass(frozen=True)
class Layer:
    """One MoE layer of a checkpoint. Raises as `Checkpoint` does; `open_layer` makes it."""

    checkpoint: Checkpoint
    number: int

    @property
    def names(self) -> Names:
        return self.checkpoint.config.names

    @property
    def _mlp(self) -> str:
        return self.names.module(self.number)

    @property
    def _first(self) -> str:
        """The weight that tells how experts are stored."""
        prefix, matrix = self.names.experts(self.number), next(iter(self.names.matrices))
        if self.packed:
            return f"{prefix}.{FUSED[matrix]}{BLOCKS}"
        return f"{prefix}.{FUSED[matrix]}" if self.fused else f"{prefix}.0.{self.names.matrices[matrix]}.weight"

    def _concerned(self, name: str) -> bool:
        """Whether a tensor may belong to this layer's router or experts, under whatever prefix. Layers that predict
        further tokens have numbers of their own, and so have those of a model beside this one."""
        numbered = f"layers.{self.number}."
        if numbered not in name:
            return False
        before, _, after = name.partition(numbered)
        parts = before.split(".")
        if parts[0] in self.names.beside:
            return False
        return not parts[-1] and "mtp" not in parts and not ATTENTION.match(after) and bool(OF_THE_MLP.search(after))

    @cached_property
    def fused(self) -> bool:
        """CheckpointError if some experts are fused and others are not."""
        names, prefix = self.checkpoint.files, self.names.experts(self.number)
        if self.interleaved:
            return True
        fused = self.names.fused is not None and f"{prefix}.gate_up_proj" in names
        by_itself = f"{prefix}.0.{self.names.up}.weight"
        if fused and by_itself in names:
            problem = f"tensors {prefix}.gate_up_proj and {by_itself} are both there: which of them counts is not said"
            raise CheckpointError(self.checkpoint.directory, problem)
        return fused

    @property
    def interleaved(self) -> bool:
        return self.names.fused == "interleaved"

    @property
    def packed(self) -> bool:
        """Whether its experts are MXFP4."""
        return self.scheme == MXFP4

    @cached_property
    def transposed(self) -> bool:
        """Whether fused experts lie as [E, H, 2I] and [E, I, H]. Of the two shapes at least one tells."""
        if self.names.fused != "either":
            return self.names.fused == "transposed"
        spec = self.checkpoint.config.spec
        tensors = [f"{self.names.experts(self.number)}.{name}" for name in dict.fromkeys(FUSED.values())]
        self.checkpoint.require(tensors)
        shapes = [self.checkpoint.header(name)[1][1:] for name in tensors]
        return shapes == [(spec.hidden, 2 * spec.intermediate), (spec.intermediate, spec.hidden)]

    @cached_property
    def scheme(self) -> Scheme | None:
        """How its experts are quantized, None where they aren't."""
        found = self.checkpoint.config.quantization_of(self.number)
        return found.scheme if found else None

    @cached_property
    def spec(self) -> MoESpec:
        """The layer as its files say: what config.json makes of it, or, where that leaves its dtype open, the dtype of
        its tensors. CheckpointError names both where they contradict each other."""
        config = self.checkpoint.config
        said = config.layer_spec(self.number)
        name = self._first
        self.checkpoint.require([name])
        dtype, _ = self.checkpoint.header(name)
        path = self.checkpoint.path_of(name)
        if self.packed:  # its headers are compared with what pieces say
            self._check_groups(said)
            self._refuse_strangers(said)
            return said
        if dtype not in FORMATS:
            raise UnsupportedError(
                f"dtype {dtype} of tensor {name} in {path}", ["nothing here computes it"], tuple(FORMATS)
            )
        found = FORMATS[dtype]
        expected = "fp8" if said.quantized else said.dtype
        if found != expected and (said.quantized or found == "fp8" or config.dtype is not None):
            raise CheckpointError(path, f"tensor {name} has dtype {dtype}, but {self._reason(said)}")
        if self.fused and self.scheme:
            self._check_fused_scales(said, self.scheme)
        self._refuse_strangers(said)
        return said if said.quantized else said.with_changes(dtype=found)

    def _check_groups(self, spec: MoESpec) -> None:
        sizes = {name: getattr(spec, name) for name in ("hidden", "intermediate")}
        reasons = [f"{name} {size} is no multiple of {GROUP}" for name, size in sizes.items() if size % GROUP]
        if reasons:
            raise UnsupportedError(f"MXFP4 experts in {self.checkpoint.path_of(self._first)}", reasons)

    def _check_fused_scales(self, spec: MoESpec, scheme: Scheme) -> None:
        what = f"fused experts {self._first} in {self.checkpoint.path_of(self._first)}"
        if self.interleaved:
            reason = "experts whose gate and up lie in turns are read as bf16, float32 or MXFP4"
            raise UnsupportedError(what, [reason], ["no quantization_config", "quant_method mxfp4"])
        if scheme.grain != "block" or self.transposed:
            reason = "fused experts are read with a scale for each 128×128 block, as [E, 2I, H]"
            raise UnsupportedError(what, [reason], ["experts one by one"])
        if spec.intermediate % BLOCK:
            reason = f"intermediate {spec.intermediate} is no multiple of {BLOCK}: a block of scales holds gate and up"
            raise UnsupportedError(what, [reason])

    def _refuse_strangers(self, spec: MoESpec) -> None:
        """CheckpointError for tensors of the layer that nothing here reads: biases, further scales, more experts. To
        leave them out would give other numbers than the model's."""
        strange = sorted(filter(self._strange(spec), filter(self._concerned, self.checkpoint.files)))
        if strange:
            listed = ", ".join(map(plain, strange[:3])) + (", ..." if len(strange) > 3 else "")
            problem = f"layer {self.number} has tensors that nothing here reads: {listed}"
            raise CheckpointError(self.checkpoint.directory, problem)

    def _strange(self, spec: MoESpec) -> Callable[[str], bool]:
        """Whether a tensor of the layer is none of those that are read."""
        names, scheme = self.names, self.scheme
        matrix = "|".join(names.matrices.values())
        scale = f"({scheme.suffix})?" if scheme else ""
        of_expert = rf"weight{scale}" + ("|input_scale" if scheme and scheme.static else "")
        by_itself = rf"experts\.(?P<expert>0|[1-9][0-9]*)\.({matrix})\.({of_expert})"
        of_fused = f"{BLOCKS}|{SCALES}" if self.packed else scale
        of_fused += f"|{BIAS}" if spec.expert_bias else ""
        known = [rf"experts\.(gate_up|down)_proj({of_fused})" if self.fused else by_itself, re.escape(names.router)]
        if spec.correction_bias:
            known.append(re.escape(names.bias))
        if spec.router_bias:
            known.append(re.escape(names.logit_bias))
        if spec.shared_intermediate:
            known.append(rf"{names.shared}\.({matrix})\.(weight(_scale(_inv)?)?|input_scale)")
        if spec.shared_gate and names.shared_gate:
            known.append(re.escape(names.shared_gate))
        pattern = re.compile(rf"{re.escape(self._mlp)}\.({'|'.join(known)})")

        def strange(name: str) -> bool:
            match = pattern.fullmatch(name)
            expert = match.groupdict().get("expert") if match else None
            return not match or (expert is not None and int(expert[:9]) >= spec.num_experts)

        return strange

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
            return f"{quantization.where} makes this layer {FP8_DTYPE} (no list takes it out)"
        if config.quantizations:
            return f"{config.quantizations[0].where} lists this layer as not converted ({said.quant_label})"
        return f"{config.path} has no quantization_config and says {said.quant_label}"

    def router(self) -> list[TensorFormat]:
        """Its weight and, if it has them, its correction bias and the bias of its logits, in this order."""
        spec = self.checkpoint.config.spec
        E = spec.num_experts
        tensors = [TensorFormat(f"{self._mlp}.{self.names.router}", (E, spec.hidden), ROUTER_DTYPES)]
        if spec.correction_bias:
            tensors.append(TensorFormat(f"{self._mlp}.{self.names.bias}", (E,), ROUTER_DTYPES, ((1, E),)))
        if spec.router_bias:
            tensors.append(TensorFormat(f"{self._mlp}.{self.names.logit_bias}", (E,), ROUTER_DTYPES))
        return tensors

    def expert(self, expert: int) -> list[Piece]:
        """gate, up and down, each followed by its scales or its bias if there are any."""
        prefix = self.names.experts(self.number)
        if self.interleaved:
            return interleaved(prefix, self.spec, expert, self.packed)
        if self.fused:
            return fused(prefix, self.names, self.spec, expert, self.scheme, self.transposed)
        return alone(f"{prefix}.{expert}", self.names, self.spec, self.spec.intermediate, self.scheme)

    def shared_expert(self) -> list[Piece]:
        """Like `expert`. ConfigError for a model without one, UnsupportedError for one of another format than the
        routed experts have."""
        spec = self.spec
        if spec.shared_intermediate < 1:
            raise ConfigError("model.shared_intermediate", 0, f"{self.checkpoint.directory} has no shared expert")
        prefix = f"{self._mlp}.{self.names.shared}"
        pieces = alone(prefix, self.names, spec, spec.shared_intermediate, self.scheme)
        self.checkpoint.require([pieces[0].tensor.name])
        found, _ = self.checkpoint.header(pieces[0].tensor.name)
        wanted = pieces[0].tensor.dtypes
        if found not in wanted and found in FORMATS:
            what = f"the shared expert of layer {self.number} of {self.checkpoint.directory} in {found}"
            raise UnsupportedError(what, ["it must have the format of the routed experts"], wanted)
        return pieces

    def token_gate(self) -> list[TensorFormat]:
        """The weight of the shared expert's gate; none where it isn't gated."""
        if not (self.spec.shared_gate and self.names.shared_gate):
            return []
        H = self.spec.hidden
        return [TensorFormat(f"{self._mlp}.{self.names.shared_gate}", (1, H), ROUTER_DTYPES, ((H,),))]

    def inputs(self) -> list[TensorFormat]:
        """The static scales of what goes into the experts' first matrices, a shared expert's among them where it has
        some; none where activations have dynamic ones."""
        if not (self.scheme and self.scheme.static):
            return []
        prefixes = [f"{self.names.experts(self.number)}.{expert}" for expert in range(self.spec.num_experts)]
        shared = f"{self._mlp}.{self.names.shared}"
        if f"{shared}.{self.names.up}.input_scale" in self.checkpoint.files:
            prefixes.append(shared)
        first = [module for matrix, module in self.names.matrices.items() if matrix != "down"]
        return [input_scale(prefix, module) for prefix in prefixes for module in first]

    def second_input(self, expert: int | None) -> TensorFormat:
        """Likewise of what goes into the last matrix of one expert; None is the shared one."""
        of_expert = f"{self.names.experts(self.number)}.{expert}"
        shared = f"{self._mlp}.{self.names.shared}"
        return input_scale(shared if expert is None else of_expert, self.names.down)

    def check(self, tensors: Iterable[TensorFormat]) -> None:
        """CheckpointError unless all are there, each in its shape and dtype. Reads headers only."""
        wanted = {tensor.name: tensor for tensor in tensors}
        self.checkpoint.require(wanted)
        for tensor in wanted.values():
            self.checkpoint.expect(tensor)


def tensors_of(pieces: Iterable[Piece]) -> list[TensorFormat]:
    return [tensor for piece in pieces for tensor in piece.tensors]


def open_layer(source: Source, layer: int) -> Layer:
    """Raises ConfigError for a layer without experts."""
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    checkpoint.config.require_moe_layer(layer)
    return Layer(checkpoint, layer)


def spec_as(stored: MoESpec, quant: QuantKind | None) -> MoESpec:
    """The layer as it is to be loaded: as it is `stored`, or a bf16 one quantized as `quant` when it is read. Raises
    ConfigError for a layer of another format, and for static scales of activations, which nothing here can know."""
    if quant in (None, stored.quant):
        return stored
    kinds = ("fp8_block", "fp8_channel", "fp8_tensor_dynamic")
    if stored.quant_label != "bf16":
        raise ConfigError("quant", quant, f"the layer is stored as {stored.quant_label}", (stored.quant,))
    if quant not in kinds:
        rule = "a bf16 checkpoint has no scales of activations" if quant == "fp8_tensor_static" else "is no FP8 format"
        raise ConfigError("quant", quant, rule, kinds)
    changed: MoESpec = stored.with_changes(quant=quant)
    return changed


def layer_spec(source: Source, layer: int, quant: QuantKind | None = None) -> MoESpec:
    """The spec of one layer, its format as the layer's own tensors and the model's files say, or `quant` for a bf16
    layer that is to be quantized when it is loaded (`spec_as`). A folder without any weights is taken at its
    config.json's word: a plan needs no more. Of others, the headers of the router and of the first and the last expert
    must fit; `check_layer` looks at all. Raises CheckpointError (files or tensors missing, damaged or contradictory),
    UnsupportedError (a format that is not read) or ConfigError (no such MoE layer, a `quant` that can't be)."""
    found = open_layer(source, layer)
    if not found.checkpoint.holds_weights:
        return spec_as(found.checkpoint.config.layer_spec(layer), quant)
    ends = [*found.expert(0), *found.expert(found.spec.num_experts - 1)]
    found.check([*found.router(), *found.inputs(), *tensors_of(ends)])
    found.refuse_strays()
    return spec_as(found.spec, quant)


def check_layer(source: Source, layer: int, shared: bool = False) -> ModelConfig:
    """Raise CheckpointError unless every tensor of the layer's router and experts (and shared expert, if `shared`) is
    there in the right shape and dtype, in files that are not truncated. Reads headers only: milliseconds per file.
    Gives the model's config with the spec of this very layer."""
    found = open_layer(source, layer)
    experts: list[int | None] = list(range(found.spec.num_experts))
    pieces = [piece for expert in range(found.spec.num_experts) for piece in found.expert(expert)]
    if shared:
        pieces += found.shared_expert()
        experts.append(None)
    inputs, gate = found.inputs(), found.token_gate() if shared else []
    if inputs:
        inputs += [found.second_input(expert) for expert in experts]
    found.check([*found.router(), *inputs, *gate, *tensors_of(pieces)])
    found.refuse_strays()
    return with_fields(found.checkpoint.config, spec=found.spec)
