"""`moe-dist train-tiny`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from moe_dist.bench.output import said
from moe_dist.commands.flags import NUMBER, Json
from moe_dist.commands.printing import print_json, print_line
from moe_dist.commands.progress import Reporter
from moe_dist.errors import ConfigError, OutputError
from moe_dist.exits.exit_codes import OK
from moe_dist.integrations.evaluation.sums import STEPS
from moe_dist.integrations.transformers.version import installed
from moe_dist.model.spec import LEAST_SEED, MOST_SEED

Directory = Annotated[str, Parameter(help="New folder for the checkpoints bf16 and fp8_block, and for sums.jsonl.")]
Steps = Annotated[int, NUMBER, Parameter(help="Of training, 64 sums each.")]
Seed = Annotated[int, NUMBER, Parameter(help="Of the first weights, the order of the sums, and which are held out.")]


def train_tiny(directory: Directory, /, *, steps: Steps = STEPS, seed: Seed = 0, json: Json = False) -> int:
    if not LEAST_SEED <= seed <= MOST_SEED:
        raise ConfigError("seed", seed, "has more than 64 bits", f"{LEAST_SEED} to {MOST_SEED}")
    from moe_dist.integrations.evaluation import training

    training.check(directory, steps)
    installed()
    try:
        with Reporter(steps, remaining=True) as reporter:

            def progress(text: str) -> None:
                reporter.step()
                reporter.shown(text)

            made = training.train_tiny(directory, steps=steps, seed=seed, progress=progress)
    except OSError as error:
        raise OutputError(directory, said(error)) from None
    if json:
        paths = {"bf16": str(made.bf16), "fp8_block": str(made.fp8_block), "task": str(made.task)}
        print_json(paths | {"accuracy": made.accuracy})
    else:
        print_line(f"a Qwen3-MoE model that adds: {made.bf16}, and with FP8 experts: {made.fp8_block}")
        print_line(f"held-out sums: {made.task}")
        print_line(f"of them it has {made.accuracy:.1%} right before weights are rounded")
        print_line("next:")
        print_line(f"  moe-dist eval {made.fp8_block} --baseline {made.bf16} --task {made.task} --limit 200")
    return OK
