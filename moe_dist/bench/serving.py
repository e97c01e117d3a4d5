"""What a measured choice is called elsewhere: the flags of serving stacks that mean the same, and the call here.

Sharded tokens are those of data-parallel attention, replicated ones those of tensor-parallel attention. The flags are
those of SGLang 0.5 and vLLM 0.12 and later. They choose the same placement and the same kind of exchange there, with
kernels of the stack's own: times measured here are not theirs.
"""

from __future__ import annotations

from moe_dist.bench.row import Row

PAIRWISE = ("all_to_all", "nvlink", "fused")  # exchanges that send a row only to ranks that need it


def sglang(row: Row) -> str:
    """Flags of `python -m sglang.launch_server`."""
    flags = [f"--tp-size {row.world}"]
    if row.ep > 1:
        flags.append(f"--ep-size {row.ep}")
    if row.token_layout == "sharded":
        flags.append(f"--enable-dp-attention --dp-size {row.world}")
    if row.ep > 1 and row.exchange in PAIRWISE:
        flags.append("--moe-a2a-backend deepep")
    return " ".join(flags)


def vllm(row: Row) -> str | None:
    """Flags of `vllm serve`; None for grids, which it does not have: its experts are spread over all ranks or none."""
    if row.tp > 1 and row.ep > 1:
        return None
    sharded = row.token_layout == "sharded"
    flags = [f"--data-parallel-size {row.world}" if sharded else f"--tensor-parallel-size {row.world}"]
    if row.ep > 1:
        flags.append("--enable-expert-parallel")
        if sharded:
            pairwise = row.exchange in PAIRWISE
            flags.append(f"--all2all-backend {'deepep_high_throughput' if pairwise else 'allgather_reducescatter'}")
    return " ".join(flags)


def python(row: Row) -> list[str]:
    """The lines of the call that gives this layer of a checkpoint here."""
    sizes = [f"{name}={size}" for name, size in (("tp", row.tp), ("ep", row.ep)) if size > 1]
    names = [f'exchange="{row.exchange}"', f'backend="{row.backend}"']
    layout = ['token_layout="replicated"'] if row.token_layout == "replicated" else []
    return ["load_layer(CHECKPOINT, LAYER,", f"           {', '.join([*sizes, *names, *layout])})"]
