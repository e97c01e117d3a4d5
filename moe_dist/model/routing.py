"""Which experts a token goes to: the routers of the supported models, and synthetic routing for experiments."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from dataclasses import dataclass
from decimal import Decimal
from pickle import UnpicklingError

import torch
from torch import Tensor

from moe_dist.errors import ConfigError, shown
from moe_dist.files import require_regular
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
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FORMS = {
    "zipf": re.compile(r"[0-9]{1,6}(\.[0-9]{0,12})?|\.[0-9]{1,12}"),
    "hot": re.compile(r"[0-9]{1,6}"),
    "limited": re.compile(r"[0-9]{1,6}x[0-9]{1,6}"),
}


@dataclass(frozen=True)
class Routing:
    """`ids_TK` int32, global expert ids, -1 for none; `weights_TK` float32, of no account where the id is -1."""

    ids_TK: Tensor
    weights_TK: Tensor

    @property
    def tokens(self) -> int:
        return self.ids_TK.shape[0]

    def legal(self, num_experts: int) -> Tensor:
        """Which places hold an expert, bool [T, K]."""
        return (self.ids_TK >= 0) & (self.ids_TK < num_experts)

    def rows(self, start: int, stop: int) -> Routing:
        return Routing(self.ids_TK[start:stop], self.weights_TK[start:stop])

    def to(self, device: torch.device | str) -> Routing:
        return Routing(self.ids_TK.to(device), self.weights_TK.to(device))


def route(logits_TE: Tensor, spec: MoESpec, bias_E: Tensor | None = None) -> Routing:
    """Router logits to top-k experts and their weights, in float32 as the models do it.

    softmax (Qwen3-MoE, Mixtral): top-k of the probabilities, divided by their sum if `renormalize`.
    sigmoid (DeepSeek-V3 `noaux_tc`, Kimi-K2, GLM-4.x): top-k of score + `bias_E`, weights are the scores without the
    bias. With groups, only the `top_groups` groups whose two best biased scores sum highest may be chosen
    (DeepSeek-V3 technical report, arXiv 2412.19437, section 2.1.2). Weights are scaled by `routed_scaling` last.

    An expert whose logit or bias is -inf is no choice. Places that no other expert can fill get id -1 and weight 0.
    A score that is NaN is chosen and makes its weight NaN, so that the output shows it. Raises ConfigError for logits
    or a bias that are no dense tensors of floats, of the wrong shape, or on two devices and, on a CPU, for a bias that
    is NaN or +inf; `Router` looks at it on every device.
    """
    check_floats("logits", logits_TE)
    if logits_TE.ndim != 2 or logits_TE.shape[1] != spec.num_experts:
        raise ConfigError("logits", tuple(logits_TE.shape), "one column per expert", f"[tokens, {spec.num_experts}]")
    if spec.correction_bias != (bias_E is not None):
        raise ConfigError("bias", "given" if bias_E is not None else None, f"correction_bias is {spec.correction_bias}")
    if bias_E is not None:
        check_bias(bias_E, spec, values=logits_TE.device.type == "cpu")
        if bias_E.device != logits_TE.device:
            raise ConfigError("router.bias.device", bias_E.device, "not the device of the logits", logits_TE.device)
    logits = logits_TE.float()
    scores = logits.softmax(-1) if spec.scoring == "softmax" else logits.sigmoid()
    choice = scores if bias_E is None else scores + bias_E.float()
    choice = choice.masked_fill(logits == float("-inf"), float("-inf"))
    if spec.num_groups > 1:
        choice = _mask_groups(choice, spec.num_groups, spec.top_groups)
    chosen, ids = choice.topk(spec.top_k, dim=-1)
    empty = chosen == float("-inf")
    weights = torch.where(chosen.isnan(), chosen, scores.gather(-1, ids)).masked_fill(empty, 0.0)
    if spec.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return Routing(ids.to(torch.int32).masked_fill(empty, -1), weights * spec.routed_scaling)


def check_bias(bias_E: Tensor, spec: MoESpec, values: bool, masks: bool = True) -> None:
    """Raise ConfigError for a correction bias that is no dense tensor of floats [E] and, if `values`, for one that is
    NaN, +inf or, unless it `masks`, -inf in float32. Looking at values makes the host wait for a GPU."""
    check_floats("router.bias", bias_E)
    if tuple(bias_E.shape) != (spec.num_experts,):
        raise ConfigError("router.bias", tuple(bias_E.shape), "one value per expert", f"[{spec.num_experts}]")
    if not values:
        return
    bad = ~bias_E.float().isfinite() & ~((bias_E == float("-inf")) & masks)
    if bool(bad.any()):
        expert = int(bad.nonzero()[0, 0])
        rule = f"is the bias of expert {expert}, which every token or none would go to"
        raise ConfigError("router.bias", float(bias_E[expert]), rule, "finite values")


def check_floats(field: str, tensor: Tensor, device: torch.device | None = None) -> None:
    """Raise ConfigError unless it is a dense tensor of floats of two bytes or more, on a device where values lie, which
    is `device` if given."""
    if not isinstance(tensor, Tensor):
        raise ConfigError(field, type(tensor).__name__, "is no tensor", "a torch.Tensor")
    if tensor.dtype not in WEIGHT_DTYPES:
        legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
        raise ConfigError(f"{field}.dtype", tensor.dtype, "wrong dtype", legal)
    if tensor.layout != torch.strided:
        raise ConfigError(f"{field}.layout", tensor.layout, "must be a dense tensor", torch.strided)
    if tensor.is_meta or (device is not None and tensor.device != device):
        rule = "holds no values" if tensor.is_meta else "not the router's device"
        raise ConfigError(f"{field}.device", tensor.device, rule, device or ("cpu", "cuda"))


def _mask_groups(choice_TE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    grouped = choice_TE.view(len(choice_TE), num_groups, -1)
    best_two = grouped.topk(2, dim=-1).values
    # Of two groups with a single legal expert the better one is meant, not either: -inf would make them equal.
    group_scores = best_two.where(best_two != float("-inf"), _below_all(choice_TE)[:, None, None]).sum(-1)
    kept = group_scores.topk(top_groups, dim=-1).indices
    mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, kept, True)
    return grouped.masked_fill(~mask[..., None], float("-inf")).flatten(-2)


def _below_all(choice_TE: Tensor) -> Tensor:
    """For each token a number [T] that stands for -inf: with it and any score a sum is less than that of any two."""
    finite = choice_TE.isfinite()
    lowest = choice_TE.where(finite, float("inf")).amin(-1)
    highest = choice_TE.where(finite, float("-inf")).amax(-1)
    below = lowest - 2 * (highest - lowest) - 1e-3 * lowest.abs() - 1
    return below.where(finite.any(-1), 0.0).clamp_min(torch.finfo(below.dtype).min)


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
