import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer.runtime.rows import RowLayout, aligned, combine, empty_rows, row_norm


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("count", "dtype", "expected"),
    [
        (0, torch.float32, 0),
        (1, torch.float32, 16),
        (16, torch.float32, 16),
        (17, torch.float32, 32),
        (9, torch.float64, 16),
        (33, torch.bfloat16, 64),
    ],
)
def test_aligned_rounds_up_to_64_bytes(count, dtype, expected):
    assert aligned(count, dtype) == expected


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_large_rows_take_memory_when_they_are_written():
    before = resident_mib()
    rows = empty_rows(2, 2**24 + 5, torch.float32, "cpu")  # 128 MiB
    assert resident_mib() < before + 16
    assert all(row.data_ptr() % 64 == 0 for row in rows)
    rows[1] = 1.0
    assert before + 48 < resident_mib() < before + 80
    assert not rows[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_row_starts_at_a_multiple_of_64_bytes(dtype):
    rows = empty_rows(5, 37, dtype, "cpu")
    assert rows.shape == (5, 37)
    assert not rows.any()
    assert all(row.data_ptr() % 64 == 0 for row in rows)


def test_slices_are_aligned_in_order_and_apart():
    layout = RowLayout(mlp())
    assert [s.name for s in layout.slices] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [s.tensor for s in layout.slices] == [0, 1, 2, 3]
    assert all(s.begin * 4 % 64 == 0 for s in layout.slices)
    assert all(a.end <= b.begin for a, b in zip(layout.slices, layout.slices[1:], strict=False))
    assert layout.d == 64
    assert layout.size == 15 + 3 + 6 + 2


def test_gather_copies_parameters_and_clears_padding():
    module = mlp()
    layout = RowLayout(module)
    row = layout.gather(module, torch.full((layout.d,), 7.0))
    for view, p in zip(layout.views(row), module.parameters(), strict=True):
        assert torch.equal(view, p)
    assert torch.equal(layout.values(row), torch.cat([p.flatten() for p in module.parameters()]))
    assert row.abs().sum() == layout.values(row).abs().sum()  # nothing in the padding


def test_a_bound_module_lives_in_the_row():
    module = mlp()
    layout = RowLayout(module)
    row, grad = torch.zeros(layout.d), torch.zeros(layout.d)
    layout.gather(module, row)
    layout.bind(module, row, grad)
    x = torch.ones(2, 5)
    before = module(x)
    module(x).sum().backward()
    assert grad.any()
    assert torch.equal(next(layout.views(grad)), module[0].weight.grad)
    row.mul_(2)
    assert not torch.equal(module(x), before)
    assert module[0].weight.data_ptr() == row.data_ptr()


def test_tied_parameters_appear_once_and_frozen_ones_not_at_all():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    module[2].weight.requires_grad_(False)
    names = [s.name for s in RowLayout(module).slices]
    assert names == ["0.weight", "0.bias", "1.bias", "2.bias"]


def test_a_module_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        RowLayout(nn.ReLU())


def test_mixed_dtypes_need_one_row_each():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"parameters have dtypes .* use one row per dtype"):
        RowLayout(module)
    assert [s.name for s in RowLayout(module, torch.float64).slices] == ["1.weight", "1.bias"]


def test_combine_makes_a_new_block_or_writes_where_told():
    x, y = torch.ones(2, 3), torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    assert combine([(2.0, x), (-1.0, y)]).tolist() == [[1, 0, -1], [-2, -3, -4]]
    assert combine([(2, x), (torch.tensor([[1.0], [0.0]]), y)], out=y) is y
    assert y.tolist() == [[3, 4, 5], [2, 2, 2]]
    assert torch.equal(x, torch.ones(2, 3))


def test_row_norm_is_the_norm_of_each_row():
    x = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    assert row_norm(x).tolist() == [[5.0], [2.0]]


def test_a_row_adopts_the_parameters_of_a_module_in_place_of_their_memory():
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    layout = RowLayout(module)
    expected = layout.gather(module, torch.empty(layout.d))
    row = torch.full((layout.d,), 7.0)
    assert torch.equal(layout.adopt(module, row), expected)
    assert all(
        p.data_ptr() == view.data_ptr()
        for p, view in zip(layout.parameters(module), layout.views(row), strict=True)
    )
