"""FlashInfer's SM90 module: is it built, and building it with the user watching. It takes 23 minutes on 64 cores."""

from __future__ import annotations

import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_dist.errors import ResourceError
from moe_dist.messages.building import SAY_EVERY_S, say
from moe_dist.step.rows import Support

MODULE = "fused_moe_90"
BUILD_COMMAND = "moe-dist build flashinfer_cutlass"


def build_state() -> Support:
    """Whether the module is there. Does not build; imports FlashInfer (about 2 s) only if it is installed."""
    if find_spec("flashinfer") is None:
        return Support(False, "flashinfer-python is not installed (pip install 'moe_dist[gpu]')")
    if _built():
        return Support(True, "built")
    return Support(False, f"not built yet; `{BUILD_COMMAND}` does it once (23 minutes on 64 cores)")


def _built() -> bool:
    from flashinfer.jit import env

    return bool(env.get_aot_artifacts(MODULE)) or (env.FLASHINFER_JIT_DIR / MODULE / f"{MODULE}.so").exists()


def ensure_built() -> None:
    """Return once the module is built. FlashInfer's own lock lets one process build; the others say what they wait for.

    Progress goes to standard error every 15 seconds: objects compiled so far and the time.
    """
    if find_spec("flashinfer") is None:
        raise ResourceError("package", "flashinfer-python", "none", "pip install 'moe_dist[gpu]'")
    if _built():
        return
    from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module

    spec = gen_cutlass_fused_moe_sm90_module()
    objects = [Path(path) for path in spec.get_object_paths()]
    say(f"FlashInfer's SM90 module is not built: compiling {len(objects)} sources now, 23 minutes on 64 cores.")
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(objects, done), daemon=True)
    watcher.start()
    try:
        module: Any = spec.build_and_load()
        del module
    finally:
        done.set()
        watcher.join()
    say("FlashInfer's SM90 module is built.")


def _watch(objects: list[Path], done: threading.Event) -> None:
    began = time.monotonic()
    while not done.wait(SAY_EVERY_S):
        ready = sum(path.exists() for path in objects)
        far = f"{ready} of {len(objects)} objects, {_since(began)}"
        say(f"one process compiles FlashInfer's SM90 module: {far}", progress=True)


def _since(began: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    return f"{minutes} min {seconds} s"
