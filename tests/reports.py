"""Results files for the tests of `report`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unit.test_bench import row

ROOT = Path(__file__).parents[1]
RECORDED = sorted(
    path for path in (ROOT / "benchmarks").glob("*.json") if "rows" in json.loads(path.read_text())
)  # another one there says which tests ran


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\"'`|"


def rows_of(tp_us: Iterable[float], ep_us: Iterable[float], first: int = 64, **changes: Any) -> list[dict[str, Any]]:
    """TP2 and EP2 at `first` tokens, 16 times as many, and so on, in a CUDA graph."""
    found = []
    for step, times in enumerate(zip(tp_us, ep_us, strict=True)):
        tokens = first * 16**step
        for grid, us in zip(({"tp": 2}, {"ep": 2}), times, strict=True):
            given = {"global_tokens": tokens, "tokens_per_rank": tokens // 2, "graph": True, "floor_us": us / 2,
                     "tflops": 10.0 * 4**step, "hbm_gbps": 800.0, "link_gbps": 1.0}  # fmt: skip
            found.append(row(**grid, p50=us, **(given | changes)).model_dump(mode="json"))
    return found


def document(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    machine = {"gpu": "NVIDIA H200", "cpu": None, "cores": 32, "count": 2, "driver": "580.1", "python": "3.12.3",
               "torch": "2.11", "triton": "3.6", "nccl": "2.28.9", "flashinfer": None, "deep_gemm": None}  # fmt: skip
    given = {"date": "2026-11-27T10:00:00Z", "commit": "abc1234", "command": "moe-dist compare", "machine": machine,
             "ranks": {"2": ["rank 0: cuda", "rank 1: cuda"]}, "notices": [], "refused": []}  # fmt: skip
    return given | {"rows": rows} | changes


def written(folder: Path, name: str, content: Any) -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def many(count: int) -> dict[str, Any]:
    """So many rows of several models, routings, backends, exchanges and steps."""
    found = rows_of([1.0], [1.0])
    rows = []
    for number in range(count):
        step, place = number // 2 % 12, number // 24
        us = 300.0 + 40 * 2**step + number % 17 / 7
        changes = {
            "global_tokens": 16 * 2**step, "tokens_per_rank": 8 * 2**step, "skew": f"zipf:{place % 5}",
            "model": f"model {place // 5 % 6}", "backend": ("triton", "cutlass", "torch")[place // 30 % 3],
            "exchange": ("ag_rs", "all_to_all", "nvlink")[place // 90 % 3], "seed": place // 270, "p50_us": us,
            "per_layer_us": us, "floor_us": us / 3, "err_oracle": us / 1e6, "hbm_gbps": us * 7, "tflops": us / 9,
            "round_p50_us": [us - 1 / 3, us, us + 1 / 7], "p99_us": us * 1.1,
            "stages_us": {name: us / part for part, name in enumerate(found[0]["stages_us"], 5)},
        }  # fmt: skip
        rows.append(found[number % 2] | changes)
    return document(rows)


def evil(folder: Path) -> str:
    """A file whose every text wants to be more than text."""
    rows = rows_of([100.0, 200.0], [120.0, 150.0], model=EVIL, skew=EVIL, exchange=EVIL, config=EVIL)
    rows += rows_of([90.0, 200.0], [130.0, 150.0], model=EVIL, skew=EVIL, exchange=EVIL, backend=EVIL)
    rows = [each | {"stages_us": {EVIL: 5.0}} for each in rows]
    content = document(rows, refused=[{"case": EVIL, "reason": EVIL}], commit=EVIL, command=EVIL, date=EVIL,
                       note=EVIL, notices=[{"text": EVIL, "ranks": [0]}], ranks={EVIL: [EVIL]})  # fmt: skip
    content["machine"] |= {"gpu": EVIL, "driver": EVIL}
    return written(folder, "<b>evil.json", content)
