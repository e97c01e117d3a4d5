"""What backends share whose forward is a `kernels.triton.pipeline.Pipeline`, and how those with configs choose one."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import MISSING, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_type_hints

import torch

from moe_dist.backends.base import Backend, Problem
from moe_dist.errors import ConfigError
from moe_dist.machine.machine import HOPPER
from moe_dist.model.quantization import Activations, quantize_rows
from moe_dist.model.spec import MoESpec
from moe_dist.model.weights import ExpertWeights
from moe_dist.oracle.numerics import Numerics
from moe_dist.step import Sink, Step, Support, TokenRows, Whole, Workspace
from moe_dist.tables import Shape, find_table, tuned_config

if TYPE_CHECKING:
    from moe_dist.kernels.triton.pipeline import Pipeline

C = TypeVar("C")

LONGEST_ROW = 16384  # what one program quantizes with one scale
GRANULARITY = 16  # columns that an FP8 tensor core's operand is made of, and bytes of a wide load


def on_hopper(device: str) -> Support:
    """Whether there is the GPU that these kernels are for."""
    if device != "cuda" or not torch.cuda.is_available():
        return Support(False, "needs an NVIDIA Hopper GPU (SM90)")
    capability = torch.cuda.get_device_capability()
    if capability != HOPPER:
        return Support(False, f"needs SM90, this GPU is SM{capability[0]}{capability[1]}")
    if find_spec("triton") is None:  # for what is around the GEMMs, whoever computes those
        return Support(False, "needs the package triton")
    return Support(True)


class OwnPipelines(Backend):
    """[gate; up] or [up; gate] weights, as they come; bf16 rows or rows quantized already."""

    capturable = True
    deterministic = True
    takes = ("token", "expert")

    @classmethod
    def payloads(cls, spec: MoESpec) -> frozenset[str]:
        return frozenset({"none", "bf16"} | ({"fp8"} if spec.quantized else set()))

    def prepare(self, weights: ExpertWeights) -> None:
        self._weights = weights
        self._empty = weights.num_experts == 0 or weights.width == 0

    @classmethod
    def scratch_bytes(cls, problem: Problem, rows: int) -> int:
        """By a forward in which nothing is launched."""
        from moe_dist.kernels.triton.launch import idle

        nowhere = torch.device("meta")
        weights = ExpertWeights.empty(problem.spec, problem.num_local, problem.width, nowhere)
        backend, step = cls(problem), Step(Workspace(nowhere))
        backend.prepare(weights)
        x, slots_RK, weights_RK = (
            torch.empty(rows, columns, dtype=dtype, device=nowhere)
            for columns, dtype in (
                (problem.spec.hidden, problem.spec.torch_dtype),
                (problem.spec.top_k, torch.int32),
                (problem.spec.top_k, torch.float32),
            )
        )
        backend.use_config(cls.known_config(problem, rows))
        given: Activations = x
        if problem.payload == "fp8":
            given = quantize_rows(x, problem.spec.quant, weights.a13)
        with idle():
            sink = Whole(step, (rows, problem.spec.hidden), torch.float32, nowhere, lasting=True)
            backend.forward(step, TokenRows(given, slots_RK, weights_RK), sink)
        return step.workspace.high_water

    @classmethod
    def known_config(cls, problem: Problem, rows: int) -> dict[str, Any] | None:
        """What it would run with."""
        return None

    @abstractmethod
    def pipeline(self, step: Step, rows: TokenRows) -> Pipeline:
        """The launches for at least one row through at least one expert."""

    def forward(self, step: Step, rows: TokenRows, sink: Sink) -> None:
        if len(rows) == 0 or self._empty:
            sink.put_zeros()
        else:
            self.pipeline(step, rows).run(self.spec.activation, sink)


class OwnKernels(OwnPipelines, Generic[C]):
    """With configs. `name` is the backend's, as its tables have it."""

    name: ClassVar[str]

    @classmethod
    def numerics_of(cls, spec: MoESpec) -> Numerics:
        """A scale for a whole row of GEMM2's input needs a second pass over it; it waits for that in bf16."""
        return Numerics(
            bf16_activation=spec.quant in ("none", "fp8_channel", "fp8_tensor_dynamic"),
            bf16_maximum=spec.quant == "fp8_tensor_dynamic",
        )

    @classmethod
    def supports(cls, problem: Problem) -> Support:
        spec, width = problem.spec, problem.width
        if problem.capability != HOPPER:
            return Support(False, f"needs compute capability 9.0, not {problem.capability}")
        if spec.dtype != "bf16":
            return Support(False, f"computes bf16 and FP8 layers, not {spec.quant_label}")
        sizes = f"hidden ({spec.hidden}) and slices ({width})"
        if spec.hidden % GRANULARITY or width % GRANULARITY:
            return Support(False, f"needs {sizes} in multiples of {GRANULARITY}")
        if spec.quant in ("fp8_channel", "fp8_tensor_dynamic") and max(spec.hidden, width) > LONGEST_ROW:
            return Support(False, f"{spec.quant} needs {sizes} of at most {LONGEST_ROW}: a whole row has one scale")
        return Support(True)

    @classmethod
    @abstractmethod
    def config_of(cls, values: dict[str, Any], spec: MoESpec) -> C:
        """A config from its JSON values; raises ConfigError for one that can't run."""

    @abstractmethod
    def pipeline_with(self, step: Step, rows: TokenRows, config: C) -> Pipeline:
        """`pipeline` with this config."""

    def prepare(self, weights: ExpertWeights) -> None:
        super().prepare(weights)
        self._forced: C | None = None
        self._chosen: dict[int, C] = {}
        self._sources: dict[str, None] = {}  # a set in the order of their use

    def use_config(self, config: dict[str, Any] | None) -> None:
        self._forced = None if config is None else self.config_of(config, self.spec)
        if self._forced is not None:
            self._sources["given"] = None

    def config_sources(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def pipeline(self, step: Step, rows: TokenRows) -> Pipeline:
        """With the config in use, else the table's, else the default."""
        config = self._forced or self._chosen.get(len(rows)) or self._choose(len(rows))
        return self.pipeline_with(step, rows, config)

    @classmethod
    def known_config(cls, problem: Problem, rows: int) -> dict[str, Any]:
        shape = Shape.of(cls.name, problem.device_name, problem.spec, problem.width, problem.num_local)
        table = find_table(shape, cls.table_revision)
        return cls.default_config(problem, rows) if table is None else table.entries[table.nearest(rows)].config

    def _choose(self, count: int) -> C:
        problem = self.problem
        shape = Shape.of(self.name, problem.device_name, self.spec, problem.width, problem.num_local)
        found = tuned_config(shape, self.table_revision, count)
        if found is None:
            config, source = self.config_of(self.default_config(problem, count), self.spec), "default"
        else:
            config, source = self._from_table(shape, found.config), found.source
        self._chosen[count] = config
        self._sources[source] = None
        return config

    def _from_table(self, shape: Shape, values: dict[str, Any]) -> C:
        try:
            return self.config_of(values, self.spec)
        except ConfigError as error:
            raise ConfigError(f"{shape.file_name}: {error.field}", error.value, error.rule, error.legal) from None


def config_from(kind: type[C], values: dict[str, Any]) -> C:
    """The dataclass `kind` from JSON values. Raises ConfigError for names that it has not or lacks, and for values of
    another type: kernels are compiled with whatever they are given."""
    declared: Any = kind
    types, known = get_type_hints(kind), {field.name: field for field in fields(declared)}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"config.{name}", value, "unknown key", tuple(known))
        if type(value) is not types[name]:
            raise ConfigError(f"config.{name}", value, f"is {type(value).__name__}", types[name].__name__)
    for name, field in known.items():
        if name not in values and field.default is MISSING:
            raise ConfigError(f"config.{name}", None, "missing", types[name].__name__)
    return kind(**values)
