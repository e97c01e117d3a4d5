"""Each of these files needs a serving stack, installed without most of what it depends on (`make test-sglang`, `make
test-vllm`), and is left out where that is not installed."""

from __future__ import annotations

from importlib.util import find_spec

from absent import stand_in

# Of a stack, what it imports at its top and these tests have no use for.
STACKS = {
    "sglang": ("IPython", "compressed_tensors", "gguf", "sentencepiece", "torchvision", "tvm_ffi"),
    "vllm": ("llguidance", "openai_harmony", "uvloop", "xgrammar"),
}

collect_ignore_glob = [f"test_{stack}*.py" for stack in STACKS if find_spec(stack) is None]
for stack, names in STACKS.items():
    if find_spec(stack) is not None:
        stand_in(*names)
