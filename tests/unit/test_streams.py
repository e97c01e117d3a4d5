"""Random streams: one for each purpose and key, none with numbers of another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moe_dist.model.spec import MoESpec
from moe_dist.workloads.random_weights import random_expert
from moe_dist.workloads.streams import Stream

SPEC = MoESpec(hidden=256, intermediate=128, num_experts=4, top_k=2, quant="none", dtype="fp32")


def test_a_key_gives_the_same_numbers_and_every_other_key_gives_others():
    keys = [("a",), ("a", 0), ("a", 1), ("b", 1), ("a", 0, 1), ("a", 1, 0), ("a", "1"), ("a", 2**40), ("a", 2**72)]
    drawn = [Stream(*key).normal(64) for key in keys]
    assert all(torch.equal(numbers, Stream(*key).normal(64)) for numbers, key in zip(drawn, keys, strict=True))
    for one, other in itertools.combinations(drawn, 2):
        assert not torch.equal(one, other)
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.6


def test_a_key_is_its_value_whatever_its_type():
    expected = Stream("test", 3).normal(8)
    for key in (np.int64(3), torch.tensor(3)):
        assert torch.equal(Stream("test", key).normal(8), expected)
    with pytest.raises(TypeError):
        Stream("test", 3.5)


def test_distributions():
    stream = Stream("test of distributions")
    normal, uniform, gumbel = stream.normal(20000), stream.uniform(20000), stream.gumbel(20000)
    assert (float(normal.mean()), float(normal.std())) == (pytest.approx(0, abs=0.05), pytest.approx(1, abs=0.05))
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
    assert bool(gumbel.isfinite().all())
    assert float(gumbel.mean()) == pytest.approx(0.5772, abs=0.05)
    assert stream.permutation(50).sort().values.tolist() == list(range(50))
    assert sorted(set(stream.integers(3, 10, 20).flatten().tolist())) == [0, 1, 2]


def test_the_world_around_changes_nothing():
    plain = Stream("test", 1).normal(3, 4)
    torch.set_default_dtype(torch.float64)
    try:
        assert Stream("test", 1).normal(3, 4).dtype == torch.float32
        assert torch.equal(Stream("test", 1).normal(3, 4), plain)
        assert Stream("test", 1).gumbel(3).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_tokens_are_no_rows_of_any_expert():
    """Seeds that are added and multiplied by hand once made token t row t of expert 1's weights."""
    for seed in (0, 1, 500):
        tokens = Stream("tokens", seed).normal(64, SPEC.hidden)
        for expert in range(SPEC.num_experts):
            for weights_seed in (0, 1):
                rows = random_expert(SPEC, expert, weights_seed).w13_eFH[0]
                cosine = torch.nn.functional.normalize(tokens) @ torch.nn.functional.normalize(rows).T
                assert float(cosine.abs().max()) < 0.5
