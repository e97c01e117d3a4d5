"""A tiny Qwen3-MoE model that has learned to add, trained on the spot: where no weights can be fetched, accuracy can
still be that of a model that knows something."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.folder import folder
from moe_dist.checkpoint.quantizing import quantize_checkpoint
from moe_dist.checkpoint.writing import system_errors
from moe_dist.errors import ConfigError
from moe_dist.integrations.evaluation.sums import (
    END,
    PAD,
    PROMPT,
    STEPS,
    UNKNOWN,
    VOCABULARY,
    codes_of,
    split_sums,
    write_task,
)
from moe_dist.integrations.transformers.version import needed
from moe_dist.machine.surroundings import unaffected
from moe_dist.workloads.streams import Stream

MOST_STEPS = 100_000
BATCH, RATE, WARMUP, LEAST_RATE = 64, 3e-3, 100, 0.02
PARTS = ("bf16", "fp8_block", "sums.jsonl")
SIZES: dict[str, Any] = {  # multiples of 128 where FP8 blocks lie
    "vocab_size": 16, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "num_experts": 4,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.02,
    "output_router_logits": True, "tie_word_embeddings": False, "max_position_embeddings": 64, "bos_token_id": None,
    "pad_token_id": VOCABULARY.index(PAD), "eos_token_id": VOCABULARY.index(END),
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """Folders of the checkpoint in bf16 and in FP8, the file of held-out questions, and the share of them that the
    trained weights answer right in float32, before anything is rounded."""

    bf16: Path
    fp8_block: Path
    task: Path
    accuracy: float


@unaffected
def train_tiny(
    directory: Path | str, *, steps: int = STEPS, seed: int = 0, progress: Callable[[str], None] | None = None
) -> Trained:
    """Train on a CPU and write `directory`/bf16, /fp8_block and /sums.jsonl: whole, or not at all. About a minute of
    one core. `progress` is told after every step. Raises ConfigError for a directory that holds something and for a
    number of steps that can't be, InstallationError without transformers, OSError where nothing can be written."""
    target = check(directory, steps)
    made = needed("transformers", "Qwen3MoeForCausalLM"), needed("transformers", "Qwen3MoeConfig")
    training, asked = split_sums(seed)
    partial = target.resolve().with_name(f".{target.resolve().name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        with _one_thread(), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(int(Stream("tiny model", seed).integers(1 << 62)))
            model = _trained(*made, _tokens(training), steps, seed, progress or (lambda _: None))
        accuracy = _accuracy(model, _tokens(asked))
        _save(model, partial / PARTS[0])
        quantize_checkpoint(partial / PARTS[0], partial / PARTS[1])
        write_task(partial / PARTS[2], asked)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    bf16, fp8_block, task = (target / part for part in PARTS)
    return Trained(bf16, fp8_block, task, accuracy)


def check(directory: Path | str, steps: int) -> Path:
    """The folder, if it is free. Raises ConfigError as `train_tiny`."""
    target = folder(directory, "directory")
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        raise ConfigError("steps", steps, "is no number of steps of training", f"1 to {MOST_STEPS:,}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("directory", str(target), "is there already and not empty", "a new or an empty folder")
    return target


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors are so small that several threads mostly wait for each other, and their number would change sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tokens(pairs: list[tuple[int, int]]) -> Tensor:
    return torch.tensor([codes_of(*pair) for pair in pairs])


def _trained(
    model_class: Any, config_class: Any, rows: Tensor, steps: int, seed: int, progress: Callable[[str], None]
) -> Any:
    config = config_class(**SIZES)
    config._experts_implementation = "grouped_mm"  # eager goes expert by expert, which is some times slower
    model = model_class(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP) * max(LEAST_RATE, 1 - step / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(steps):
        picked = Stream("tiny batch", seed, step).integers(len(rows), BATCH)
        loss = model(rows[picked], labels=rows[picked]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(f"training, loss {float(loss.detach()):.3f}")
    return model.eval()


def _accuracy(model: Any, rows: Tensor) -> float:
    """Each token of an answer given those before it: a whole answer is right exactly if all are."""
    with torch.no_grad():
        found = model(rows[:, :-1]).logits.argmax(-1)[:, PROMPT - 1 :]
    return float((found == rows[:, PROMPT:]).all(1).float().mean())


def _save(model: Any, into: Path) -> None:
    model.config.output_router_logits = False  # of use in training only
    needed("transformers.utils.logging", "disable_progress_bar")()
    with system_errors():
        model.to(torch.bfloat16).save_pretrained(into)
    tokenizer().save_pretrained(into)


def tokenizer() -> Any:
    """A character is a token, built here. Raises InstallationError without transformers."""
    wrapper = needed("transformers", "PreTrainedTokenizerFast")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    codes = {text: code for code, text in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordLevel(codes, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return wrapper(tokenizer_object=made, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)
