"""Arithmetic on sizes."""

from __future__ import annotations

import torch

from moe_dist.model.sizes import cdiv, power_of_2, row_bytes


def test_powers_of_two():
    assert [power_of_2(count) for count in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]


def test_pieces():
    assert [cdiv(count, 4) for count in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_the_bytes_of_a_row_do_not_need_one():
    assert row_bytes(torch.empty(0, 3, 5, dtype=torch.bfloat16)) == 30
    assert row_bytes(torch.empty(7)) == 4
