"""Our backends as MoE runners of SGLang: `--moe-runner-backend moe_dist_NAME`. `register` is what SGLang's entry-point
group `sglang.srt.plugins` calls in each of its processes. docs/integration.md says what is served."""

from __future__ import annotations

from moe_dist.integrations.package import Package

SGLANG = Package("sglang", ("0.5.23",))
PREFIX = "moe_dist_"


def register() -> None:
    """Add a choice for each backend to --moe-runner-backend, and the hooks by which FP8 experts reach it. Again in the
    same process it does nothing.

    Raises InstallationError where SGLang is not installed or lacks an interface. SGLang logs what a plugin raises and
    goes on without it; its command line then refuses the names, because nothing has added them.
    """
    from moe_dist.integrations.sglang.registering import register_all

    register_all()
