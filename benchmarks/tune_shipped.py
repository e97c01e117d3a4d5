"""Makes the tuning tables that the package ships, on as many GPUs as are here:

    python benchmarks/tune_shipped.py OUT_DIR [SECONDS [BACKEND]]

The shapes of the models in configs/models under TP and EP of 1, 2, 4 and 8, the most asked for first; each is one
rank's shard on one GPU. Without time for all of them within SECONDS the last ones are left out, and said. BACKEND:
triton or cutlass.
"""

from __future__ import annotations

import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

MODELS = ("DeepSeek-V3", "Qwen3-235B-A22B", "Qwen3-30B-A3B", "GLM-4.7", "Nemotron-H", "Mixtral-8x7B", "Kimi-K2")
GRIDS = ({"tp": 4}, {"ep": 4}, {"tp": 2}, {"ep": 2}, {"tp": 8}, {"ep": 8}, {})
ROWS = [8, 32, 128, 512, 2048, 8192]
SEEDS = 2


def plans(backend: str) -> list[Any]:
    from moe_dist.commands.config import find_model
    from moe_dist.engine.planning import make_plan
    from moe_dist.errors import MoeDistError
    from moe_dist.model.spec import ParallelSpec

    found = []
    for grid in GRIDS:
        for name in MODELS:
            exchange = "ag_rs" if grid else "local"
            try:
                found.append(make_plan(find_model(name), ParallelSpec(**grid), exchange=exchange, backend=backend))
            except MoeDistError as error:
                print(f"left out: {name} {grid}: {error}", flush=True)
    return found


def work(device: int, devices: int, folder: str, until: float, name: str) -> None:
    import torch

    from moe_dist.backends import BACKENDS
    from moe_dist.bench.tune import tune_shape, wanted_configs

    torch.cuda.set_device(device)
    mine = [(plan, part) for plan in plans(name) for part in plan.parts()][device::devices]
    start = time.time()
    backend = BACKENDS.get(name)
    for _ in backend.compile_ahead(wanted_configs(backend, [part for _, part in mine], ROWS)):
        pass
    print(f"GPU {device}: {len(mine)} shapes, compiled in {time.time() - start:.0f} s", flush=True)
    seen = set()
    for plan, part in mine:
        label = f"{plan.spec.name} {plan.parallel.label} {part.shape.file_name}"
        if part.shape in seen:
            continue
        seen.add(part.shape)
        if time.time() > until:
            print(f"left out, no time: {label}", flush=True)
            continue
        start = time.time()
        try:
            with torch.inference_mode():
                tuned = tune_shape(plan, part, ROWS, SEEDS, 0, lambda _: None, lambda: None)
        except torch.cuda.OutOfMemoryError as error:
            print(f"left out: {label}: {error}", flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        if tuned.table:
            tuned.table.write(Path(folder))
        ratios = [
            f"{found.rows}: {found.entry.us:.0f} ({found.entry.us / (found.entry.floor_us or 1):.2f})"
            if found.entry
            else f"{found.rows}: {found.reason}"
            for found in tuned.found
        ]
        print(f"{label} {time.time() - start:.0f} s  {', '.join(ratios)}", flush=True)


def main() -> None:
    import torch

    folder, seconds = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 3600.0
    name = sys.argv[3] if len(sys.argv) > 3 else "triton"
    devices, until = torch.cuda.device_count(), time.time() + seconds
    spawn = get_context("spawn")
    processes = [spawn.Process(target=work, args=(n, devices, folder, until, name)) for n in range(devices)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
