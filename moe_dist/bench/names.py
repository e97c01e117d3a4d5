"""What an experiment's keys take where their types don't say it: names of registries, and forms of text."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moe_dist.backends import BACKENDS
from moe_dist.engine.planning import AUTO, COMBINE_DTYPES, PAYLOADS
from moe_dist.exchange import EXCHANGES
from moe_dist.model.refused import legal
from moe_dist.model.spec import Name
from moe_dist.peers import PEERS
from moe_dist.step import FORMS
from moe_dist.workloads.skew_names import SKEWS

PLACEMENTS = ("tp", "ep", "tp2xep2 and the like", AUTO, "map:FILE of moe-dist balance --out")

Placements = Annotated[tuple[Name, ...], Field(min_length=1, json_schema_extra=legal(lambda: PLACEMENTS))]
Exchanges = Annotated[
    tuple[Name, ...], Field(min_length=1, json_schema_extra=legal(lambda: (*EXCHANGES.names(), AUTO)))
]
Backends = Annotated[tuple[Name, ...], Field(min_length=1, json_schema_extra=legal(lambda: (*BACKENDS.names(), AUTO)))]
Peers = Annotated[
    tuple[Name, ...], Field(json_schema_extra=legal(lambda: PEERS.names() or "peers that packages bring"))
]
Skews = Annotated[tuple[str, ...], Field(min_length=1, json_schema_extra=legal(lambda: SKEWS))]
Payload = Annotated[str, Field(json_schema_extra=legal(lambda: PAYLOADS))]
Form = Annotated[str, Field(json_schema_extra=legal(lambda: ("auto", *FORMS)))]
CombineDtype = Annotated[str, Field(json_schema_extra=legal(lambda: COMBINE_DTYPES))]
