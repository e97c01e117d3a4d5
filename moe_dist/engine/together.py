"""Which exchanges and backends go together: those where one hands over a form of rows that the other takes. All do but
the halves of a whole layer, which only go with each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moe_dist.backends import BACKENDS, Backend
from moe_dist.exchange import EXCHANGES, Exchange
from moe_dist.model.spec import TokenLayout

WHOLE = "layer"  # of step.rows.FORMS


def go_together(exchange: type[Exchange[Any, Any]], backend: type[Backend]) -> bool:
    return WHOLE not in (*exchange.makes, *backend.takes) or not set(exchange.makes).isdisjoint(backend.takes)


def against(exchange: str, backend: str, token_layout: TokenLayout) -> str:
    """Why these names don't go together; empty where they do."""
    exchange_class, backend_class = EXCHANGES.get(exchange).for_layout(token_layout), BACKENDS.get(backend)
    if go_together(exchange_class, backend_class):
        return ""
    if WHOLE in exchange_class.makes:
        partners = [name for name, each in BACKENDS.usable() if go_together(exchange_class, each)]
        return f"exchange {exchange} goes with a backend that computes whole layers alone ({_listed(partners)})"
    given = ((name, each.for_layout(token_layout)) for name, each in EXCHANGES.usable())
    partners = [name for name, each in given if go_together(each, backend_class)]
    return f"backend {backend} computes whole layers, and goes with exchange {_listed(partners)} alone"


def _listed(names: Iterable[str]) -> str:
    return " or ".join(names) or "none that is here"


def pairs_of(exchanges: Iterable[str], backends: Iterable[str], token_layout: TokenLayout) -> list[tuple[str, str]]:
    """All pairs of these names but those that don't go together, as far as both names have a partner here."""
    exchanges, backends = list(exchanges), list(backends)
    every = [(exchange, backend) for exchange in exchanges for backend in backends]
    fitting = [pair for pair in every if not _known_apart(*pair, token_layout)]
    served = {name for pair in fitting for name in pair}
    return [pair for pair in every if pair in fitting or not {*pair} <= served]


def _known_apart(exchange: str, backend: str, token_layout: TokenLayout) -> bool:
    """Names that nobody has and `auto` stay, and are said elsewhere."""
    if exchange not in EXCHANGES.names() or backend not in BACKENDS.names():
        return False
    return bool(against(exchange, backend, token_layout))
