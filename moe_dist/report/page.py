"""The HTML page: one file that asks nothing of any network, readable without its script, which only sorts, filters and
shows what marks say."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_dist.report import tables
from moe_dist.report.all_rows import AllRows, all_rows, embedded
from moe_dist.report.findings import Setup, setups, told
from moe_dist.report.line_charts import latency, over_floor, roofline
from moe_dist.report.mark_charts import backend_marks, skew_marks, stage_bars
from moe_dist.report.recorded import Recorded
from moe_dist.report.svg import Figure
from moe_dist.report.tables import Table
from moe_dist.report.words import phase, summary, title_of, tokens_of, verdict

GENERATOR = "moe-dist report"
DRAWN_MOST = 40  # setups with charts; the tables have all
SENTENCES_MOST = 12  # setups of one file that are told in sentences


@dataclass(frozen=True)
class Part:
    """A file with its setups, and what is drawn of them."""

    file: Recorded
    setups: list[Setup]
    drawn: list[tuple[Setup, list[Figure]]]
    skews: list[Figure]
    provenance: list[tuple[str, str]]
    refused: Table


def page(files_: Sequence[Recorded]) -> str:
    """The whole page."""
    parts = _parts(files_)
    found = [setup for part in parts for setup in part.setups]
    table = all_rows(files_, found)
    css, script = _packaged("page.css") + _right_hand(table), _packaged("page.js")
    environment = Environment(
        loader=PackageLoader("moe_dist.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html").render(
        generator=GENERATOR, parts=parts, css=Markup(css), script=Markup(script), css_hash=_hash(css),
        script_hash=_hash(script), table=table, data=embedded(table),
        comparisons=tables.comparisons(found), marked=tables.marked(files_), numbers=tables.details(found, files_),
        most=SENTENCES_MOST, summary=summary, told=told, title_of=title_of,
        phase=phase, tokens_of=tokens_of, verdict=verdict,
        undrawn=sum(len(part.setups) - len(part.drawn) for part in parts),
    )  # fmt: skip


def _parts(files_: Sequence[Recorded]) -> list[Part]:
    found, room = [], DRAWN_MOST
    for file in files_:
        of_file = setups(file)
        drawn = of_file[:room]
        room -= len(drawn)
        figures = [(setup, _figures(setup)) for setup in drawn]
        found.append(Part(file, of_file, figures, skew_marks(file, drawn), tables.provenance(file),
                          tables.refused(file)))  # fmt: skip
    return found


def _figures(setup: Setup) -> list[Figure]:
    """Those that its rows have numbers for."""
    found = [latency(setup), over_floor(setup), roofline(setup), *map(stage_bars, setup.ends), backend_marks(setup)]
    return [figure for figure in found if figure]


def _right_hand(table: AllRows) -> str:
    """Style of the columns of numbers: a class in each of their cells would be a tenth of the page."""
    places = [place for place, column in enumerate(table.columns, 2) if column.numeric]
    cells = ", ".join(f"#all td:nth-child({place})" for place in places)
    return f"{cells} {{ text-align: right; }}\n" if places else ""


def _packaged(name: str) -> str:
    return (files("moe_dist.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """By which the page's policy knows its own script and style: nothing else runs, whatever a results file holds."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
