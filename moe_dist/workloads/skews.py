"""Routings for experiments: drawn by a skew, or recorded from a real run."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from decimal import Decimal
from pickle import UnpicklingError

import torch
from torch import Tensor

from moe_dist.errors import ConfigError, shown
from moe_dist.files import require_regular
from moe_dist.model.routing import WEIGHT_DTYPES, Routing
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MOST_TOKENS, MoESpec
from moe_dist.workloads.streams import Stream

SKEWS = (
    "balanced, uniform, zipf:S (S from 0 to 100), hot:N (N experts), limited:GxN (N of G groups), single, router,"
    " file:PATH"
)
STEEPEST = 100.0  # of zipf: far beyond, the odds are no float32 numbers
LARGEST_TRACE = 1 << 30  # bytes
LEAST_WEIGHT = 1e-30  # of a trace's largest: below, float32 and bf16 lose the output, and zeros agree with zeros
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FORMS = {
    "zipf": re.compile(r"[0-9]{1,6}(\.[0-9]{0,12})?|\.[0-9]{1,12}"),
    "hot": re.compile(r"[0-9]{1,6}"),
    "limited": re.compile(r"[0-9]{1,6}x[0-9]{1,6}"),
}


def check_skew(skew: str) -> None:
    """Raise ConfigError unless `skew` is well formed; a file must be there."""
    kind, _, argument = skew.partition(":")
    if skew in ("balanced", "uniform", "single", "router"):
        return
    if kind == "file" and argument:
        try:
            size = require_regular(argument).st_size
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
            said = getattr(error, "strerror", None) or str(error)
            raise ConfigError("workload.skew", skew, f"can't be read: {said}", SKEWS) from None
        if size > LARGEST_TRACE:
            rule = f"has {size:,} bytes, and a trace is repeated to as many tokens as there are"
            raise ConfigError("workload.skew", skew, rule, f"at most {LARGEST_TRACE:,}")
        return
    form = _FORMS.get(kind)
    if form is None or not form.fullmatch(argument) or not _in_bounds(kind, argument):
        raise ConfigError("workload.skew", skew, "not a known routing", SKEWS)


def _in_bounds(kind: str, argument: str) -> bool:
    if kind == "limited":
        groups, chosen = map(int, argument.split("x"))
        return 1 <= chosen <= groups
    return float(argument) <= STEEPEST if kind == "zipf" else int(argument) >= 1


def canonical_skew(skew: str) -> str:
    """One spelling for what is one routing: zipf:1.20 and zipf:01.2 are zipf:1.2. Raises like `check_skew`."""
    check_skew(skew)
    kind, _, argument = skew.partition(":")
    if kind == "zipf":
        exponent = format(Decimal(argument), "f")
        return f"zipf:{exponent.rstrip('0').rstrip('.') or '0' if '.' in exponent else exponent}"
    if kind in ("hot", "limited"):
        return f"{kind}:" + "x".join(str(int(number)) for number in argument.split("x"))
    return skew


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


def skew_label(skew: str, trace: str | None = None) -> str:
    """The skew as results name it: a file by the hash of the content that was measured, everything else as given."""
    return skew if trace is None else f"file:{trace[:12]}"


def synthetic_routing(
    spec: MoESpec, tokens: int, skew: str, seed: int, number: int = 0, trace: str | None = None
) -> Routing:
    """Routing of `tokens` rows over the whole group, drawn on the CPU: the same whatever the number of ranks. One seed
    has as many of them as there are values of `number`.

    balanced: every expert gets the same number of rows (± 1). uniform: K distinct experts at random.
    zipf:S: expert of popularity rank r is drawn with odds r^-S, popularity being a random order of the experts.
    hot:N: N random experts fill as many of a token's K places as they can, the rest is uniform.
    limited:GxN: the experts lie in G equal runs, and each token draws its K uniformly from N random ones of them: the
    device-limited routing of DeepSeek-V2 (arXiv 2405.04434, section 2.2.2), where a token reaches few ranks.
    single: all rows on one random expert, the other K-1 places empty (id -1).
    file:PATH: a torch file {"ids": int [rows, K], "weights": float [rows, K]}, repeated to `tokens` rows. ConfigError
    if it is not the content whose hash is `trace`, if a row holds an expert twice, and if these rows hold no expert
    with a weight.
    """
    skew = canonical_skew(skew)
    kind, _, argument = skew.partition(":")
    check_skew_fits(skew, spec)
    stream = Stream("synthetic routing", skew, tokens, seed, number)
    E, K = spec.num_experts, spec.top_k
    if kind == "router":
        raise ConfigError("workload.skew", skew, "needs a checkpoint with a router", SKEWS)
    if kind == "file":
        return _recorded(spec, tokens, argument, trace)
    order = stream.permutation(E)
    if kind == "balanced":
        places = torch.arange(tokens * K, device="cpu").view(tokens, K) % E
        places = places[stream.permutation(tokens)]
    elif kind == "limited":
        order = torch.arange(E, device="cpu")  # runs of neighbours are the point here
        places = _draw_limited(E, K, tokens, argument, stream)
    elif kind == "single":
        places = torch.zeros(tokens, K, dtype=torch.int64, device="cpu")
    else:
        places = _draw(E, K, tokens, kind, argument, stream)
    ids = order[places]
    logits = stream.normal(tokens, K)
    if kind == "single":
        ids[:, 1:] = -1
        logits[:, 1:] = float("-inf")
    return Routing(ids.to(torch.int32), logits.softmax(-1) * spec.routed_scaling)


def check_skew_fits(skew: str, spec: MoESpec) -> None:
    """Raises ConfigError for a skew that this model's experts don't allow."""
    kind, _, argument = skew.partition(":")
    E, K = spec.num_experts, spec.top_k
    if kind == "hot" and int(argument) > E:
        raise ConfigError("workload.skew", skew, "more hot experts than there are", f"hot:1 to hot:{E}")
    if kind == "limited":
        groups, chosen = map(int, argument.split("x"))
        if E % groups or chosen * (E // groups) < K:
            legal = [f"limited:{G}x{cdiv(K * G, E)}" for G in range(2, E + 1) if E % G == 0]
            rule = f"{E} experts must divide into the groups, and the chosen ones hold top_k = {K} experts"
            raise ConfigError("workload.skew", skew, rule, f"with the least number chosen: {', '.join(legal)}")


def _draw(E: int, K: int, tokens: int, kind: str, argument: str, stream: Stream) -> Tensor:
    """K distinct places out of E for each token: the largest of log-odds + Gumbel noise (Gumbel top-k sampling)."""
    log_odds = torch.zeros(E, dtype=torch.float32, device="cpu")
    if kind == "zipf":
        log_odds = -float(argument) * torch.arange(1, E + 1, dtype=torch.float32, device="cpu").log()
    elif kind == "hot":
        log_odds[: int(argument)] = 60.0  # e^60 to 1; more would leave the noise beside it too few bits
    chunks = [
        (log_odds + stream.gumbel(n, E)).topk(K, dim=-1).indices
        for n in [4096] * (tokens // 4096) + [tokens % 4096] * (tokens % 4096 > 0)
    ]
    return torch.cat(chunks) if chunks else torch.empty(0, K, dtype=torch.int64, device="cpu")


def _draw_limited(E: int, K: int, tokens: int, argument: str, stream: Stream) -> Tensor:
    groups, chosen = map(int, argument.split("x"))
    kept_TG = stream.uniform(tokens, groups).argsort(-1) < chosen
    odds_TE = stream.uniform(tokens, E).masked_fill(~kept_TG.repeat_interleave(E // groups, 1), -1.0)
    return odds_TE.topk(K, dim=-1).indices


def _recorded(spec: MoESpec, tokens: int, path: str, trace: str | None) -> Routing:
    """A trace: its tensors are checked before anything is made of them, because a few bytes of a file can claim any
    shape. The bytes that are hashed are those that are used."""
    content = _content(path)
    if trace is not None and (found := hashlib.sha256(content).hexdigest()) != trace:
        rule = f"is another file than when the experiment began: its SHA-256 begins with {found[:12]}"
        raise ConfigError("workload.skew", f"file:{path}", rule, f"the trace {trace[:12]}, unchanged, for every rank")
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles of other programs, which are refused anyway
            recorded = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:
        said = type(error).__name__
        if not isinstance(error, UnpicklingError):  # whose text advises to load whatever is in the file
            said += ": " + " ".join(str(error).split("\n")[0].split())[:200]
        rule = f"is no torch file of tensors ids and weights ({said})"
        raise ConfigError("workload.skew", f"file:{path}", rule) from error
    keys = list(recorded) if isinstance(recorded, dict) else type(recorded).__name__
    named = isinstance(recorded, dict) and recorded.keys() == {"ids", "weights"}
    if not named or not all(map(_plain, recorded.values())):
        legal = "a dict of dense tensors ids and weights, and nothing else"
        raise ConfigError("workload.skew", f"file:{path}", f"holds {shown(keys)}", legal)
    ids, weights = recorded["ids"].detach(), recorded["weights"].detach()
    for name, tensor, dtypes in (("ids", ids, ID_DTYPES), ("weights", weights, WEIGHT_DTYPES)):
        if tensor.dtype not in dtypes:
            legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ConfigError("workload.skew", f"file:{path}", f"holds {name} of {tensor.dtype}", legal)
    if ids.ndim != 2 or ids.shape != weights.shape or ids.shape[1] != spec.top_k or not 0 < len(ids) <= MOST_TOKENS:
        found = f"ids {tuple(ids.shape)}, weights {tuple(weights.shape)}"
        legal = f"two of shape [rows, {spec.top_k}], 1 to {MOST_TOKENS} rows"
        raise ConfigError("workload.skew", f"file:{path}", f"holds {found}", legal)
    ids, weights = ids.long(), weights.to(torch.float32)
    if ids.max() >= spec.num_experts or ids.min() < -1:
        worst = int(ids.max() if ids.max() >= spec.num_experts else ids.min())
        raise ConfigError("workload.skew", f"file:{path}", f"holds expert {worst}", f"-1 to {spec.num_experts - 1}")
    ordered = ids.sort(-1).values
    if bool((repeats := (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        row, place = repeats.nonzero()[0].tolist()
        rule = f"holds expert {int(ordered[row, place])} twice in row {row}"
        raise ConfigError("workload.skew", f"file:{path}", rule, f"{spec.top_k} experts that differ, or -1")
    weights = weights.masked_fill(ids < 0, 0.0)  # whatever stands beside no expert
    if not bool(weights.isfinite().all()):
        raise ConfigError(
            "workload.skew", f"file:{path}", "holds weights that are NaN or infinite in float32", "finite weights"
        )
    rows = len(ids)
    repeated = torch.arange(tokens, device="cpu") % rows
    ids, weights = ids[repeated], weights[repeated]
    if not bool((weights.abs() >= LEAST_WEIGHT).any()):  # nor is it where no place holds an expert
        rule = (
            f"sends its first {min(tokens, rows)} rows nowhere: every id is -1 or every weight below {LEAST_WEIGHT:g}"
        )
        raise ConfigError(
            "workload.skew", f"file:{path}", rule, "at least one expert with a weight, else nothing is measured"
        )
    return Routing(ids.to(torch.int32), weights)


def _plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
