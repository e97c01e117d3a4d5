"""Recorded routings: files of the experts and weights that a real run's tokens went to."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from moe_dist.errors import ConfigError, OutputError, shown
from moe_dist.messages.counts import count_of
from moe_dist.model.routing import WEIGHT_DTYPES, Routing
from moe_dist.model.spec import MOST_TOKENS, MoESpec
from moe_dist.workloads.skew_names import LARGEST_TRACE, SKEWS, check_skew

LEAST_WEIGHT = 1e-30  # of a trace's largest: below, float32 and bf16 lose the output, and zeros agree with zeros
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Trace:
    """`ids` int64 and `weights` float32, both [layers, rows, K], a weight beside no expert being 0. `steps`: of how
    many rows each recorded step was; None where the file does not say. `skew`: its name, for errors."""

    ids: Tensor
    weights: Tensor
    steps: tuple[int, ...] | None
    skew: str

    @property
    def layers(self) -> int:
        return len(self.ids)

    @property
    def rows(self) -> int:
        return self.ids.shape[1]

    def routing(self, layer: int, start: int, tokens: int, of: str = "") -> Routing:
        """`tokens` rows of a layer from row `start` on, from the first one again behind the last. Raises ConfigError
        where they hold no expert with a weight; `of` says there whose they are."""
        taken = (start + torch.arange(tokens, device="cpu")) % self.rows
        ids, weights = self.ids[layer, taken], self.weights[layer, taken]
        if not bool((weights.abs() >= LEAST_WEIGHT).any()):
            told = f"sends the {count_of(tokens, 'row')}{of} nowhere"
            rule = f"{told}: every id is -1 or every weight below {LEAST_WEIGHT:g}"
            legal = "at least one expert with a weight, else nothing is measured"
            raise ConfigError("workload.skew", self.skew, rule, legal)
        return Routing(ids.to(torch.int32), weights)


def trace_of(skew: str) -> str | None:
    """The SHA-256 of a recorded routing's file, in hexadecimal; None for every other skew. Taken once for a case: ranks
    compare it with what they read. Raises like `check_skew`."""
    check_skew(skew)
    kind, _, path = skew.partition(":")
    return hashlib.sha256(_content(path)).hexdigest() if kind == "file" else None


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST_TRACE + 1)
    except OSError as error:
        raise ConfigError("workload.skew", f"file:{path}", f"can't be read: {error.strerror}", SKEWS) from None


def read_trace(spec: MoESpec, skew: str, trace: str | None = None) -> Trace:
    """The file of the skew `file:PATH`: a torch file {"ids": int, "weights": float}, both [rows, K] or [layers, rows,
    K], perhaps with "steps" int [steps], the numbers of rows that the recorded steps had. Raises ConfigError if it is
    not the content whose hash is `trace`, or a row holds an expert twice, and for whatever else is no routing of
    `spec`."""
    path = skew.partition(":")[2]
    content = _content(path)
    if trace is not None and (found := hashlib.sha256(content).hexdigest()) != trace:
        rule = f"is another file than when the experiment began: its SHA-256 begins with {found[:12]}"
        raise ConfigError("workload.skew", skew, rule, f"the trace {trace[:12]}, unchanged, for every rank")
    recorded = _loaded(content, skew)
    return _checked(recorded, skew, spec.num_experts, spec.top_k)


def _loaded(content: bytes, skew: str) -> dict[str, Tensor]:
    """Its tensors are checked before anything is made of them, because a few bytes of a file can claim any shape. The
    bytes that were hashed are those that are used."""
    _check_size(content, skew)
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles of other programs, which are refused anyway
            recorded: Any = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:
        said = type(error).__name__
        if not isinstance(error, UnpicklingError):  # whose text advises to load whatever is in the file
            said += ": " + " ".join(str(error).split("\n")[0].split())[:200]
        rule = f"is no torch file of tensors ids and weights ({said})"
        raise ConfigError("workload.skew", skew, rule, "what --record-routing or torch.save wrote") from error
    keys = list(recorded) if isinstance(recorded, dict) else type(recorded).__name__
    named = isinstance(recorded, dict) and recorded.keys() - {"steps"} == {"ids", "weights"}
    if not named or not all(map(_plain, recorded.values())):
        legal = "a dict of dense tensors ids, weights and perhaps steps, and nothing else"
        raise ConfigError("workload.skew", skew, f"holds {shown(keys)}", legal)
    return {name: tensor.detach() for name, tensor in recorded.items()}


def _check_size(content: bytes, skew: str) -> None:
    """Raise ConfigError for an archive that unfolds to more than it is: torch compresses nothing, and a compressed
    megabyte of zeros is a kilobyte."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unfolded = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # no archive that Python reads; torch says what is wrong with it
        return
    if unfolded > len(content):
        rule = f"unfolds from {len(content):,} to {unfolded:,} bytes"
        raise ConfigError("workload.skew", skew, rule, "a torch file, which is not compressed")


def _plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _checked(recorded: dict[str, Tensor], skew: str, experts: int, top_k: int) -> Trace:
    def refuse(rule: str, legal: str) -> ConfigError:
        return ConfigError("workload.skew", skew, rule, legal)

    kinds = (("ids", ID_DTYPES), ("weights", WEIGHT_DTYPES), ("steps", ID_DTYPES))
    for name, dtypes in kinds:
        if name in recorded and recorded[name].dtype not in dtypes:
            legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise refuse(f"holds {name} of {recorded[name].dtype}", legal)
    ids, weights = recorded["ids"], recorded["weights"]
    if ids.ndim == weights.ndim == 2:
        ids, weights = ids[None], weights[None]
    fits = ids.ndim == 3 and ids.shape == weights.shape and ids.shape[2] == top_k
    if not fits or not 0 < len(ids) * ids.shape[1] <= MOST_TOKENS:
        found = f"ids {tuple(recorded['ids'].shape)}, weights {tuple(recorded['weights'].shape)}"
        legal = f"two of shape [rows, {top_k}] or [layers, rows, {top_k}], 1 to {MOST_TOKENS} rows in all layers"
        raise refuse(f"holds {found}", legal)
    steps = _steps(recorded.get("steps"), ids.shape[1], refuse)
    ids, weights = ids.long(), weights.to(torch.float32)
    if ids.max() >= experts or ids.min() < -1:
        worst = int(ids.max() if ids.max() >= experts else ids.min())
        raise refuse(f"holds expert {worst}", f"-1 to {experts - 1}")
    ordered = ids.sort(-1).values
    if bool((repeats := (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        layer, row, place = repeats.nonzero()[0].tolist()
        where = f"row {row}" + (f" of layer {layer}" if len(ids) > 1 else "")
        rule = f"holds expert {int(ordered[layer, row, place])} twice in {where}"
        raise refuse(rule, f"{top_k} experts that differ, or -1")
    weights = weights.masked_fill(ids < 0, 0.0)  # whatever stands beside no expert
    if not bool(weights.isfinite().all()):
        raise refuse("holds weights that are NaN or infinite in float32", "finite weights")
    return Trace(ids, weights, steps, skew)


def _steps(given: Tensor | None, rows: int, refuse: Callable[[str, str], ConfigError]) -> tuple[int, ...] | None:
    if given is None:
        return None
    legal = f"one number of rows for each step, {rows} together"
    if given.ndim != 1 or not 0 < len(given) <= MOST_TOKENS:
        raise refuse(f"holds steps {tuple(given.shape)}", legal)
    steps = tuple(given.tolist())
    if min(steps) < 0 or sum(steps) != rows:
        raise refuse(f"holds steps of {count_of(sum(steps), 'row')}, the least of them {min(steps)}", legal)
    return steps


def save_trace(path: Path | str, layers: Sequence[Sequence[Routing]], over: bool = False) -> None:
    """What `file:PATH` reads, of each layer's routing in each step. `over`: a file that is there is replaced.
    Raises ConfigError where layers differ in their numbers of rows or in top_k, where no step was recorded, and for a
    file that is there already; OutputError for one that can't be written."""
    steps = [[routing.tokens for routing in each] for each in layers]
    if not steps or not steps[0]:
        raise ConfigError("recording", "no step", "holds nothing that could be saved", "one step of a layer at least")
    for number, each in enumerate(steps):
        if each != steps[0]:
            rule = f"layer {number} was recorded in steps of other numbers of rows than layer 0: {shown(steps[0])}"
            raise ConfigError("recording", shown(each), rule, "layers that run in the same steps")
    widths = sorted({routing.ids_TK.shape[1] for each in layers for routing in each})
    if len(widths) > 1:
        rule = "experts a token: layers or steps of different top_k were recorded, and a file has one"
        raise ConfigError("recording", widths, rule, "a recording of each")
    _save(path, {
        "ids": _rows([[routing.ids_TK for routing in each] for each in layers]).to(torch.int32),
        "weights": _rows([[routing.weights_TK for routing in each] for each in layers]).to(torch.float32),
        "steps": torch.tensor(steps[0], dtype=torch.int64, device="cpu"),
    }, over)  # fmt: skip


def _rows(layers: Sequence[Sequence[Tensor]]) -> Tensor:
    joined = [torch.cat([part.detach().cpu() for part in each]) for each in layers]
    return joined[0] if len(joined) == 1 else torch.stack(joined)


def check_new(field: str, path: Path | str) -> None:
    """Raise ConfigError unless a file of this name could be made anew."""
    if Path(path).exists():
        raise ConfigError(field, str(path), "is there already and is not overwritten", "a new name")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(field, str(path), "its folder is not there", "a new name in a folder that exists")


def _save(path: Path | str, content: dict[str, Tensor], over: bool = False) -> None:
    """Whole, or not at all: a half of it would be refused as a trace, and stand in the way of the next recording."""
    if not over:
        check_new("recording", path)
    held = io.BytesIO()  # torch.save has errors of its own for a disk that is full
    torch.save(content, held)
    partial = Path(path).with_name(f".moe-dist-{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(held.getbuffer())
        partial.replace(path)
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def join_traces(paths: Sequence[Path | str], into: Path | str) -> None:
    """The recordings of a group's ranks as one: of each step the rows of rank 0, then those of rank 1 and so on, which
    is the order of sharded tokens. `paths` in the order of ranks. Raises ConfigError where they differ in layers, in
    top_k or in the number of steps, and for what `Recorder.save` did not write."""
    parts = [_loaded(_content(str(path)), f"file:{path}") for path in paths]
    for path, part in zip(paths, parts, strict=True):
        of, first = part["ids"].shape, parts[0]["ids"].shape
        whole = len(of) in (2, 3) and part["weights"].shape == of and "steps" in part
        whole = whole and part["steps"].ndim == 1 and bool(part["steps"].sum() == of[-2])
        if not whole or (*of[:-2], of[-1]) != (*first[:-2], first[-1]) or len(part["steps"]) != len(parts[0]["steps"]):
            rule = "is no recording of the same layers and steps as the first one"
            raise ConfigError("recording", str(path), rule, "what Recorder.save wrote on each rank")
    cut = {name: [part[name].split(part["steps"].tolist(), dim=-2) for part in parts] for name in ("ids", "weights")}
    content = {
        name: torch.cat([rows for step in zip(*of_ranks, strict=True) for rows in step], dim=-2)
        for name, of_ranks in cut.items()
    }
    _save(into, content | {"steps": torch.stack([part["steps"] for part in parts]).sum(0)})
