"""A whole model with moe_dist's layers as its experts beside transformers' own experts: time to first token and tokens
per second of both, in one run. docs/integration.md says what is compared.

    python examples/generate.py                                                     one GPU, or a tiny model on a CPU
    launch/torchrun.sh --standalone --nproc-per-node 2 examples/generate.py --tp 2  several
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from generate_models import SPREADS, TIMEOUT, Ranks, config_of, ours, theirs
from torch import Tensor
from transformers import StaticCache

from moe_dist.bench.results import provenance
from moe_dist.engine.graph import capture
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.integrations.transformers.settings import Settings
from moe_dist.machine.machine import Machine
from moe_dist.workloads.streams import Stream

OURS = "moe_dist"
ON_GPUS_ONLY = ("layers", "graph")
# What transformers' own generate does on GPUs: batched_mm copies the weights of every token's experts.
PREFILL = {"batched_mm": "grouped_mm"}
ROWS_NAMED = ("experts", "decode", "batch", "ttft_ms", "decode_tokens_per_s", "tokens_per_s", "same_tokens")


class Variant(NamedTuple):
    """`experts`: moe_dist or an implementation of transformers. `decode`: eager; layers, one CUDA graph for each MoE
    layer's whole step; graph, one CUDA graph around the model; compiled, by torch.compile."""

    experts: str
    decode: str


@dataclass
class Row:
    """Medians over the repeats. `ttft_ms`: the prompts' tokens to the first new one of each. `tokens_per_s`: all new
    tokens over the time of both. `same_tokens`: the part of them that the first variant gave too."""

    experts: str
    prefill_experts: str
    decode: str
    batch: int
    input_len: int
    output_len: int
    ttft_ms: float
    decode_ms: float
    decode_tokens_per_s: float
    tokens_per_s: float
    same_tokens: float
    peak_gib: float | None


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="folder of a model; default: random weights, of Qwen3-30B-A3B's sizes on GPUs")
    add("--tp", type=int, default=1, help="slices of every expert")
    add("--ep", type=int, help="groups of experts; default: what the ranks leave beside --tp")
    add("--backend", help="of moe_dist's layers")
    add("--exchange", help="of moe_dist's layers")
    formats = ("none", "fp8_block", "fp8_channel", "fp8_tensor_dynamic")
    add("--quant", choices=formats, default="fp8_block" if cuda else "none", help="what moe_dist makes of bf16 experts")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if cuda else "float32", help="of random weights")
    add("--batch-size", type=int, nargs="+", default=[16, 64] if cuda else [3])
    add("--input-len", type=int, default=1024 if cuda else 12)
    add("--output-len", type=int, default=128 if cuda else 8)
    add("--native", default="eager,batched_mm,grouped_mm", help="transformers' experts, with commas; none: ''")
    add(
        "--ours",
        default="layers,graph" if cuda else "eager",
        help="how decoding runs with moe_dist: eager,layers,graph",
    )
    add("--theirs", default="eager,graph,compiled" if cuda else "eager", help="and without: eager,graph,compiled")
    add("--layers", type=int, help="only so many of the model's")
    add("--repeats", type=int, default=5 if cuda else 2)
    add("--json", action="store_true", help="print the results as one JSON document, instead of a table")
    add("--out", help="write that document here too")
    return parser.parse_args()


def names(field: str, given: str, legal: tuple[str, ...]) -> list[str]:
    found = [name for name in given.split(",") if name]
    for name in found:
        if name not in legal:
            rule = "needs CUDA graphs, and there is no GPU" if name in ON_GPUS_ONLY else "is no name that is known"
            raise ConfigError(field, name, rule, legal)
    return found


def variants(args: argparse.Namespace) -> list[Variant]:
    """transformers' first, so that theirs are the tokens that others are compared with."""
    graphs = ON_GPUS_ONLY if torch.cuda.is_available() else ()
    theirs = names("--theirs", args.theirs, ("eager", "compiled", *graphs[1:]))
    native = names("--native", args.native, ("eager", "batched_mm", "grouped_mm"))
    if "eager" in native and theirs and "eager" not in theirs:
        rule = "experts eager of transformers wait for the host in each layer, so they decode eagerly only"
        raise ConfigError("--theirs", args.theirs, rule, "eager among them, or --native without eager")
    found = [Variant(one, decode) for one in native for decode in theirs if one != "eager" or decode == "eager"]
    ours = names("--ours", args.ours, ("eager", *graphs))
    if not found and not ours:
        raise ConfigError("--native, --ours", "", "nothing is left to run", "a name for one of them")
    return found + [Variant(OURS, decode) for decode in ours]


def check(args: argparse.Namespace) -> None:
    for field in ("tp", "ep", "input_len", "output_len", "layers", "repeats"):
        value = getattr(args, field)
        least = 2 if field == "output_len" else 1  # the first token is prefill's
        if value is not None and value < least:
            raise ConfigError(f"--{field.replace('_', '-')}", value, "is too small", f"{least} and more")
    if min(args.batch_size) < 1:
        raise ConfigError("--batch-size", args.batch_size, "are sequences", "1 and more")
    Settings(args.exchange, args.backend)  # names that nothing has are refused before anything is made


def begin(args: argparse.Namespace) -> Ranks:
    """Under torchrun one of its ranks, else alone."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    ep = max(1, world // args.tp) if args.ep is None else args.ep
    if args.tp * ep != world:
        rule = f"tp · ep must be the number of ranks, and {world} were started"
        raise ConfigError("--tp · --ep", args.tp * ep, rule, f"{world}; torchrun --nproc-per-node starts several")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        if args.native and not SPREADS:
            rule = f"transformers {transformers.__version__} does not spread experts over ranks as 5.23 and newer do"
            raise ConfigError("--native", args.native, rule, "none: '', or one rank")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Ranks(dist.get_rank() if world > 1 else 0, world, device, args.tp, ep)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def generate(
    model: Any, variant: Variant, ids_BL: Tensor, new: int, repeats: int
) -> tuple[list[float], list[float], Tensor]:
    """Milliseconds of prefill and of the decoding of new - 1 tokens, for each repeat, and the tokens [B, new] of the
    last one. Greedy. One run of both comes before, untimed."""
    device, (batch, length) = ids_BL.device, ids_BL.shape
    cache = StaticCache(config=model.config, max_cache_len=length + new)
    kept = {cache_name(model): cache, "use_cache": True, "logits_to_keep": 1}
    token_B1, tokens_BN = ids_BL[:, -1:].clone(), ids_BL.new_zeros(batch, new)

    def step(forward: Callable[..., Any], given: Tensor) -> None:
        logits = forward(input_ids=given, **kept).logits
        token_B1.copy_(logits[:, -1:].argmax(-1))

    def prefill() -> None:
        if variant.experts in PREFILL:
            model.set_experts_implementation(PREFILL[variant.experts])
        step(model, ids_BL)
        if variant.experts in PREFILL:
            model.set_experts_implementation(variant.experts)
        tokens_BN[:, :1] = token_B1

    forward = torch.compile(model, mode="reduce-overhead") if variant.decode == "compiled" else model
    one: Callable[[], object] = lambda: step(forward, token_B1)  # noqa: E731

    def decode() -> None:
        for number in range(1, new):
            one()
            tokens_BN[:, number : number + 1] = token_B1

    prefill()
    decode()
    if variant.decode == "graph":
        cache.reset()
        graph, _ = capture(one, warm_up=one)
        one = graph.replay
    times: list[tuple[float, float]] = []
    for _ in range(repeats):
        cache.reset()
        times.append((milliseconds(prefill, device), milliseconds(decode, device)))
    return [first for first, _ in times], [rest for _, rest in times], tokens_BN


def cache_name(model: Any) -> str:
    """What this transformers calls a model's cache. A name that it doesn't know it would drop in silence, and every
    step would know one token only."""
    taken = inspect.signature(type(model).forward).parameters
    for name in ("cache", "past_key_values"):
        if name in taken:
            return name
    rule = f"{type(model).__name__} takes no cache by a known name"
    raise ConfigError("transformers", transformers.__version__, rule)


def measured(args: argparse.Namespace, config: Any, ranks: Ranks) -> Iterator[Row]:
    """A row for each variant and batch; a model stays as long as it serves."""
    first: dict[int, Tensor] = {}
    model, made = None, None
    for variant in variants(args):
        buckets = tuple(sorted({*args.batch_size})) if variant.experts == OURS and variant.decode != "eager" else ()
        wanted = (variant.experts == OURS, buckets)
        if made != wanted:
            model = None
            free(ranks.device)  # before the next one is made
            model, made = ours(args, config, ranks, buckets) if wanted[0] else theirs(args, config, ranks), wanted
        if variant.experts != OURS:
            model.set_experts_implementation(variant.experts)
        for batch in args.batch_size:
            if ranks.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            prompts = Stream("prompts of generate.py", batch, device=ranks.device)
            ids_BL = prompts.integers(config.vocab_size, batch, args.input_len)
            prefill_ms, decode_ms, tokens_BN = generate(model, variant, ids_BL, args.output_len, args.repeats)
            check_alike(tokens_BN, ranks)
            first.setdefault(batch, tokens_BN)
            yield row_of(args, variant, prefill_ms, decode_ms, tokens_BN, first[batch])


def free(device: torch.device) -> None:
    torch.compiler.reset()  # what was compiled holds the model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_alike(tokens_BN: Tensor, ranks: Ranks) -> None:
    """All ranks have one batch, so they must have gone on with the same tokens."""
    if ranks.world > 1:
        everyone = [torch.empty_like(tokens_BN) for _ in range(ranks.world)]
        dist.all_gather(everyone, tokens_BN)
        if any(not torch.equal(each, tokens_BN) for each in everyone):
            raise ConfigError("tokens", "differ", "ranks with one batch must generate the same tokens")


def row_of(
    args: argparse.Namespace,
    variant: Variant,
    prefill_ms: list[float],
    decode_ms: list[float],
    tokens: Tensor,
    first: Tensor,
) -> Row:
    batch, new = tokens.shape
    ttft, rest = median(prefill_ms), median(decode_ms)
    return Row(
        experts=variant.experts, prefill_experts=PREFILL.get(variant.experts, variant.experts), decode=variant.decode,
        batch=batch, input_len=args.input_len, output_len=new, ttft_ms=round(ttft, 3), decode_ms=round(rest, 3),
        decode_tokens_per_s=round(batch * (new - 1) / rest * 1e3, 1),
        tokens_per_s=round(batch * new / (ttft + rest) * 1e3, 1),
        same_tokens=round(float((tokens == first).float().mean()), 4),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if tokens.is_cuda else None,
    )  # fmt: skip


def document(args: argparse.Namespace, config: Any, ranks: Ranks, rows: list[Row]) -> dict[str, Any]:
    sizes = ("num_hidden_layers", "hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok")
    given = {key: value for key, value in vars(args).items() if key not in ("json", "out", "checkpoint")}
    return {
        **provenance(Machine.detect(ranks.device.type)).model_dump(mode="json"),
        "transformers": transformers.__version__,
        "model": {"model_type": config.model_type, **{key: getattr(config, key, None) for key in sizes}},
        "weights": Path(args.checkpoint).name if args.checkpoint else "random",
        "ranks": ranks.world,
        "arguments": given | {"ep": ranks.ep},
        "generated": [asdict(row) for row in rows],
    }


def main() -> None:
    args = arguments()
    check(args)
    variants(args)  # what is wrong is said before anything starts
    ranks = begin(args)
    config, rows = config_of(args), []
    speaks = ranks.rank == 0
    if speaks and not args.json:
        print(*(f"{name:>19}" for name in ROWS_NAMED))
    with torch.no_grad():
        for row in measured(args, config, ranks):
            rows.append(row)
            if speaks and args.out:  # after each, so that a failure leaves what came before it
                Path(args.out).write_text(json.dumps(document(args, config, ranks, rows), indent=1) + "\n")
            if speaks and not args.json:
                print(*(f"{getattr(row, name):>19}" for name in ROWS_NAMED), flush=True)
    if speaks and args.json:
        print(json.dumps(document(args, config, ranks, rows)))


if __name__ == "__main__":
    try:
        main()
    except MoeDistError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
