"""`moe-dist demo-checkpoint`."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from moe_dist import checkpoint
from moe_dist.bench.output import said
from moe_dist.commands.flags import NUMBER, Json
from moe_dist.commands.printing import print_json, print_line
from moe_dist.errors import OutputError
from moe_dist.exits.exit_codes import OK

Directory = Annotated[str, Parameter(help="Where it is written.")]
ModelType = Annotated[Literal["qwen3_moe", "deepseek_v3"], Parameter(help="Whose form it has.")]
Seed = Annotated[int, NUMBER, Parameter(help="Of its random weights.")]


def demo_checkpoint(
    directory: Directory, /, *, model_type: ModelType = "qwen3_moe", seed: Seed = 0, json: Json = False
) -> int:
    try:
        made = checkpoint.make_checkpoint(
            directory,
            hidden=256,
            intermediate=640,
            num_experts=10 if model_type == "qwen3_moe" else 16,  # DeepSeek-V3's groups must divide the experts
            model_type=model_type,
            seed=seed,
        )
    except OSError as error:
        raise OutputError(directory, said(error)) from None
    if json:
        print_json({"checkpoint": str(made)})
    else:
        print_line(f"checkpoint of random weights: {made}")
    return OK
