"""SGLang's own registries, hooks, config, layer, loader and dispatcher with our runner core in them, on a CPU by the
reference backend. Its CUDA kernels and the packages that it only imports are not there."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from absent import stand_in
from experts import SPEC, TOLERANCE, drawn, error, expected, pieces

stand_in("IPython", "compressed_tensors", "gguf", "sentencepiece", "torchvision", "tvm_ffi")

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner.runner import _CUSTOM_RUNNER_CORE_FACTORIES
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import get_moe_runner_backend, initialize_moe_config
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.server_args import MOE_RUNNER_BACKEND_CHOICES, ServerArgs

from moe_dist.backends import BACKENDS
from moe_dist.backends.torch_reference import TorchBackend
from moe_dist.errors import ConfigError, InstallationError, MoeDistError, UnsupportedError
from moe_dist.integrations.package import Package
from moe_dist.integrations.sglang import SGLANG, core, register
from moe_dist.model.routing import Routing
from moe_dist.model.spec import ParallelSpec
from moe_dist.model.weights import shard
from moe_dist.model.placement import Placement

pytestmark = pytest.mark.stacks

load_plugins()  # SGLang's own: by the entry point of this package
