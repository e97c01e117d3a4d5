"""Our own kernels under compute-sanitizer: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_dist.backends import BACKENDS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

OWN = [name for name in ("triton", "cutlass") if name in BACKENDS.names()]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("kernels", [*OWN, "exchange"])
def test_clean(kernels, tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or not torch.cuda.is_available():
        pytest.skip("needs a GPU and compute-sanitizer")
    script = Path(__file__).parent / "sanitized.py"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script), kernels]
    # Each tensor is an allocation of its own, so that an access behind its end is one.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "done" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "RACECHECK SUMMARY: 0 hazards" in done.stdout, done.stdout[-500:]
