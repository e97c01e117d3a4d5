"""Names of routings: which are well formed, their one spelling, and which a model's experts allow."""

from __future__ import annotations

import re
from decimal import Decimal

from moe_dist.errors import ConfigError
from moe_dist.files import require_regular
from moe_dist.model.sizes import cdiv
from moe_dist.model.spec import MoESpec

SKEWS = (
    "balanced, uniform, zipf:S (S from 0 to 100), hot:N (N experts), hot_rank:RxS (one of R runs of experts gets S"
    " times its share), burst:N (N experts), limited:GxN (N of G groups), single, router, file:PATH, rotating:SKEW"
    " (SKEW of zipf, hot, hot_rank), spread:R:SKEW (over R runs; SKEW of zipf, hot, hot_rank, burst)"
)
DRAWN_SKEWS = SKEWS.replace(" router,", "")  # where there is no checkpoint
STEEPEST = 100.0  # of zipf: far beyond, the odds are no float32 numbers
LARGEST_TRACE = 1 << 30  # bytes
ROUTINGS = 8  # that the steps of a workload take in turn, where it has several
ROTATED = ("zipf", "hot", "hot_rank")
SPREAD = (*ROTATED, "burst")
_NUMBER, _COUNT = r"([0-9]{1,6}(\.[0-9]{0,12})?|\.[0-9]{1,12})", r"[0-9]{1,6}"
_FORMS = {
    "zipf": re.compile(_NUMBER),
    "hot": re.compile(_COUNT),
    "burst": re.compile(_COUNT),
    "hot_rank": re.compile(f"{_COUNT}x{_NUMBER}"),
    "limited": re.compile(f"{_COUNT}x{_COUNT}"),
}


def parts_of(skew: str) -> tuple[str, str, str]:
    """Kind, argument and, of rotating and spread, the skew inside."""
    kind, _, argument = skew.partition(":")
    if kind == "rotating":
        return kind, "", argument
    if kind == "spread":
        runs, _, inner = argument.partition(":")
        return kind, runs, inner
    return kind, argument, ""


def several_routings(skew: str) -> bool:
    """Whether steps may take more than one routing in turn; of a trace that depends on what it holds."""
    return skew.startswith(("rotating:", "file:"))


def check_skew(skew: str) -> None:
    """Raise ConfigError unless `skew` is well formed; a file must be there."""
    kind, argument, _ = parts_of(skew)
    if kind == "file" and argument:
        try:
            size = require_regular(argument).st_size
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
            said = getattr(error, "strerror", None) or str(error)
            raise ConfigError("workload.skew", skew, f"can't be read: {said}", SKEWS) from None
        if size > LARGEST_TRACE:
            rule = f"has {size:,} bytes, and a trace is repeated to as many tokens as there are"
            raise ConfigError("workload.skew", skew, rule, f"at most {LARGEST_TRACE:,}")
    elif not _well_formed(skew):
        raise ConfigError("workload.skew", skew, "not a known routing", SKEWS)


def _well_formed(skew: str) -> bool:
    kind, argument, inner = parts_of(skew)
    if kind in ("rotating", "spread"):
        runs = kind == "rotating" or (re.fullmatch(_COUNT, argument) is not None and int(argument) >= 2)
        return runs and parts_of(inner)[0] in (ROTATED if kind == "rotating" else SPREAD) and _well_formed(inner)
    if skew in ("balanced", "uniform", "single", "router"):
        return True
    form = _FORMS.get(kind)
    return form is not None and form.fullmatch(argument) is not None and _in_bounds(kind, argument)


def _in_bounds(kind: str, argument: str) -> bool:
    if kind == "limited":
        groups, chosen = map(int, argument.split("x"))
        return 1 <= chosen <= groups
    if kind == "hot_rank":
        runs, times = argument.split("x")
        return int(runs) >= 2 and float(times) >= 1
    return float(argument) <= STEEPEST if kind == "zipf" else int(argument) >= 1


def canonical_skew(skew: str) -> str:
    """One spelling for what is one routing: zipf:1.20 and zipf:01.2 are zipf:1.2. Raises like `check_skew`."""
    check_skew(skew)
    kind, argument, inner = parts_of(skew)
    if kind == "rotating":
        return f"rotating:{canonical_skew(inner)}"
    if kind == "spread":
        return f"spread:{int(argument)}:{canonical_skew(inner)}"
    if kind in _FORMS:
        return f"{kind}:" + "x".join(map(_plain_number, argument.split("x")))
    return skew


def _plain_number(text: str) -> str:
    number = format(Decimal(text), "f")
    return number.rstrip("0").rstrip(".") or "0" if "." in number else number


def skew_label(skew: str, trace: str | None = None) -> str:
    """The skew as results name it: a file by the hash of the content that was measured, everything else as given."""
    return skew if trace is None else f"file:{trace[:12]}"


def check_skew_fits(skew: str, spec: MoESpec) -> None:
    """Raises ConfigError for a skew that this model's experts don't allow."""
    kind, argument, inner = parts_of(skew)
    if inner:
        try:
            check_skew_fits(inner, spec)
        except ConfigError as error:
            raise ConfigError(error.field, skew, error.rule, error.legal) from None
    if kind in ("hot", "burst") and int(argument) > spec.num_experts:
        legal = f"{kind}:1 to {kind}:{spec.num_experts}"
        raise ConfigError("workload.skew", skew, "more hot experts than there are", legal)
    if kind == "spread" and int(argument) > spec.num_experts:
        legal = f"spread:2:{inner} to spread:{spec.num_experts}:{inner}"
        raise ConfigError("workload.skew", skew, "more runs than there are experts", legal)
    if kind == "limited":
        _check_limited(skew, argument, spec)
    if kind == "hot_rank":
        _check_hot_rank(skew, argument, spec)


def _check_limited(skew: str, argument: str, spec: MoESpec) -> None:
    E, K = spec.num_experts, spec.top_k
    groups, chosen = map(int, argument.split("x"))
    if E % groups or chosen * (E // groups) < K:
        legal = [f"limited:{G}x{cdiv(K * G, E)}" for G in range(2, E + 1) if E % G == 0]
        rule = f"{E} experts must divide into the groups, and the chosen ones hold top_k = {K} experts"
        raise ConfigError("workload.skew", skew, rule, f"with the least number chosen: {', '.join(legal)}")


def _check_hot_rank(skew: str, argument: str, spec: MoESpec) -> None:
    """A token goes to an expert once, so a run of few experts can't take all of its pairs."""
    E, K = spec.num_experts, spec.top_k
    runs, times = argument.split("x")
    most = {R: R * min(K, E // R) / K for R in range(2, E + 1) if E % R == 0}
    if int(runs) not in most or float(times) > most[int(runs)]:
        legal = [f"hot_rank:{R}x{_rounded_down(share)}" for R, share in most.items()] or "none"
        rule = (
            f"{E} experts must divide into the runs, and a run of E/R experts takes at most that many of a token's {K}"
        )
        raise ConfigError("workload.skew", skew, rule, f"at most {', '.join(legal)}" if most else legal)


def _rounded_down(value: float) -> str:
    return _plain_number(f"{int(value * 100) / 100:.2f}")


def drawn_skew(skew: str) -> str:
    """`canonical_skew` where routings are drawn or recorded, and there is no router."""
    try:
        known = canonical_skew(skew)
    except ConfigError as error:
        legal = DRAWN_SKEWS if error.legal == SKEWS else error.legal
        raise ConfigError(error.field, error.value, error.rule, legal) from None
    if known == "router":
        rule = "is a checkpoint's own, and this command reads none"
        raise ConfigError("workload.skew", skew, rule, DRAWN_SKEWS)
    return known
