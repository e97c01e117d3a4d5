"""What a rank does: a whole model in its memory, its answers, and its logits. Functions take a RankContext first; all
ranks of a group call them with the same arguments."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_dist.errors import CheckpointError
from moe_dist.integrations.evaluation.scores import Logits, mean_of_rows
from moe_dist.integrations.evaluation.setup import Setup, Variant
from moe_dist.integrations.transformers import replace_experts
from moe_dist.integrations.transformers.version import needed
from moe_dist.messages.counts import count_of, verb
from moe_dist.runtime.context import RankContext
from moe_dist.workloads.streams import Stream

MOST_ROUNDS = 16  # of draws of text
TOGETHER = 256  # rows of text drawn at once: each step has their logits several times in the model's memory


@dataclass(frozen=True)
class Said:
    """Of one batch: each prompt's continuation without special tokens, all new tokens with the ones that end an answer,
    and the seconds that it took."""

    texts: tuple[str, ...]
    tokens: int
    seconds: float


def open_model(folder: str, device: torch.device) -> tuple[Any, Any]:
    """The whole model in bf16 with transformers' eager experts, and its tokenizer, from files alone; what is stored in
    FP8 becomes bf16. Raises CheckpointError for a folder that transformers can't read, and for one that lacks weights
    or a tokenizer."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # nothing is fetched, whatever a config names
    models, tokenizers = (needed("transformers", name) for name in ("AutoModelForCausalLM", "AutoTokenizer"))
    needed("transformers.utils.logging", "disable_progress_bar")()
    given: dict[str, Any] = {"dtype": torch.bfloat16, "experts_implementation": "eager", "local_files_only": True}
    if _is_fp8(folder):
        given["quantization_config"] = needed("transformers", "FineGrainedFP8Config")(dequantize=True)
    try:
        tokenizer = tokenizers.from_pretrained(folder, local_files_only=True)
        model, loaded = models.from_pretrained(folder, output_loading_info=True, **given)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(folder, f"transformers can't load it: {' '.join(str(error).split())[:300]}") from None
    if missing := sorted(loaded["missing_keys"]):  # transformers would draw them at random
        lost = f"{count_of(len(missing), 'weight')} of the model {verb(len(missing), 'are')} missing"
        problem = f"{lost}: {', '.join(missing[:3])}"
        raise CheckpointError(folder, problem + ", ..." * (len(missing) > 3))
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().to(device), tokenizer


def _is_fp8(folder: str) -> bool:
    from moe_dist.checkpoint import read_config

    return bool(read_config(folder).quantizations)


def prepare(context: RankContext, setup: Setup, variant: Variant | None) -> None:
    """Keep the model that is asked next: the baseline's where `variant` is None. Collective."""
    context.memo.pop("model", None)  # before the next one needs its memory
    context.progress("loading the model")
    model, tokenizer = open_model(setup.checkpoint if variant else setup.baseline, context.device)
    if variant is not None:
        context.progress("replacing its experts")
        replace_experts(
            model, token_layout="replicated", tp=variant.parallel.tp, ep=variant.parallel.ep,
            exchange=variant.exchange, backend=variant.backend, quant=variant.quant, checkpoint=setup.checkpoint,
            device=context.device, timeout_s=setup.timeout_s,
        )  # fmt: skip
    context.memo["model"] = model, tokenizer


def answers(context: RankContext, prompts: list[str], new_tokens: int) -> Said:
    """Greedy continuations of one batch, padded on the left. Collective."""
    model, tokenizer = context.memo["model"]
    context.progress("generating")
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(context.device)
    start = time.perf_counter()
    out = _generate(model, tokenizer, batch["input_ids"], batch["attention_mask"], new_tokens, sample=False)
    new = out[:, batch["input_ids"].shape[1] :].cpu()  # which waits for the device
    seconds = time.perf_counter() - start
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return Said(tuple(texts), int(counted(new, _ends(model, tokenizer)).sum()), seconds)


def own_text(context: RankContext, tokens: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Text that the model draws by its own probabilities, each row from one random token on: ids [rows, length + 1]
    int64, and which of them count [rows, length + 1] bool: those drawn, to the end of the row's text. There are rows
    for `tokens` that count, and where they end early, for as many as MOST_ROUNDS of draws have given."""
    model, tokenizer = context.memo["model"]
    ordinary = torch.tensor([code for code in range(len(tokenizer)) if code not in tokenizer.all_special_ids])
    rows, ids, used = -(-tokens // length), [], []
    for number in range(MOST_ROUNDS):
        context.progress("drawing text")
        first = ordinary[Stream("first tokens", seed, number).integers(len(ordinary), rows)][:, None]
        with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
            torch.manual_seed(int(Stream("own text", seed, number).integers(1 << 62)))
            for some in first.to(context.device).split(TOGETHER):
                drawn = _generate(model, tokenizer, some, torch.ones_like(some), length, sample=True).cpu()
                padding = length + 1 - drawn.shape[1]  # all of these rows have ended earlier
                ids.append(torch.nn.functional.pad(drawn, (0, padding), value=int(tokenizer.pad_token_id)))
                kept = counted(drawn[:, 1:], _ends(model, tokenizer))
                used.append(torch.nn.functional.pad(kept, (1, padding)))
        if sum(int(each.sum()) for each in used) >= tokens:
            break
    return torch.cat(ids), torch.cat(used)


def keep_logits(context: RankContext, ids: Tensor, used: Tensor) -> None:
    """Keep the model's log-probabilities of the tokens of `ids` [rows, length] that count as the baseline's, in the
    host's memory: what `setup.logits_bytes` counts."""
    context.memo["baseline"] = list(_log_probabilities(context, ids, used))


def compare_logits(context: RankContext, ids: Tensor, used: Tensor) -> Logits:
    """Against what `keep_logits` kept, a row at a time, so that nothing else of that size is in memory. `used` [rows,
    length]: which tokens count, of each row the first ones behind that which it begins with. Collective."""
    sums: list[float] = []
    counts: list[int] = []
    own: list[Tensor] = []
    of_baseline: list[Tensor] = []
    same: list[Tensor] = []
    texts = (row[1 : 1 + count] for row, count in zip(ids, _counts(used), strict=True) if count)
    found = zip(context.memo["baseline"], _log_probabilities(context, ids, used), texts, strict=True)
    for before, after, text in found:
        sums.append(float((before.exp() * (before - after)).sum(-1).double().sum()))
        counts.append(len(text))
        for kept, each in ((own, after), (of_baseline, before)):
            kept.append(each.gather(-1, text[:, None])[:, 0])
        same.append(before.argmax(-1) == after.argmax(-1))
    mean, error = mean_of_rows(sums, counts)
    alike = float(torch.cat(same).double().mean())
    return Logits(sum(counts), len(counts), mean, error, _perplexity(own), _perplexity(of_baseline), alike)


def counted(new: Tensor, ends: list[int]) -> Tensor:
    """Which of the new tokens [rows, length] belong to their text: all up to the first that ends it, and that one."""
    ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype)).int()
    return (ended.cumsum(1) - ended) == 0


def _counts(used: Tensor) -> list[int]:
    """Of each row of text, the tokens that count."""
    counts: list[int] = used[:, 1:].sum(1).tolist()
    return counts


def _perplexity(log_probabilities: list[Tensor]) -> float:
    return float((-torch.cat(log_probabilities).double().mean()).exp())


def _log_probabilities(context: RankContext, ids: Tensor, used: Tensor) -> Iterator[Tensor]:
    """Of each row with tokens that count [count, vocabulary] in float32."""
    model, _ = context.memo["model"]
    context.progress("logits")
    for row, count in zip(ids, _counts(used), strict=True):
        if count:
            logits = model(row[None].to(context.device), use_cache=False).logits[0, :count]
            yield logits.float().cpu().log_softmax(-1)


def _generate(model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, new_tokens: int, sample: bool) -> Tensor:
    """What the checkpoint's own generation_config says of sampling is left aside: answers are greedy, text is drawn by
    the plain probabilities."""
    plain: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sample:
        plain = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    out: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id, num_beams=1, **plain
    )
    return out


def _ends(model: Any, tokenizer: Any) -> list[int]:
    given = model.generation_config.eos_token_id
    given = tokenizer.eos_token_id if given is None else given
    return [given] if isinstance(given, int) else list(given or ())
