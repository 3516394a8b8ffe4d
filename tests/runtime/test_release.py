"""A noisy sum, scaled, filtered and stepped along: the bits of the passes it replaces."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.runtime import combine, native
from gossamer.runtime.native import Direction, Piece
from gossamer.runtime.perturb import Probe, perturb_, release_
from gossamer.runtime.rows import RowLayout

EXACT = [torch.float32, torch.float64]
ROUNDED = [torch.bfloat16, torch.float16]


def layout_of(sizes, dtype=torch.float32):
    module = nn.Module()
    for k, size in enumerate(sizes):
        setattr(module, f"p{k}", nn.Parameter(torch.zeros(size, dtype=dtype)))
    return RowLayout(module)


def random_row(layout, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    row = torch.zeros(layout.d, dtype=dtype)
    for view in layout.views(row):
        view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))
    return row


def parts(count, scale=0.7):
    return [(1000 + k % 3, Probe(4, k, scale / (k + 1))) for k in range(count)]


def reference(layout, rows, noise, factor, weight, kept, out, raw, step):
    """Pass by pass, on copies: what each name stands for afterwards."""
    rows = {name: row.clone()[None] for name, row in rows.items()}
    u = rows["sum"].clone()
    for seed, p in noise:
        perturb_(u[0], layout, seed, p.step, p.probe, p.coefficient)
    combine([(factor, u)], out=u)
    y = combine([(weight, u), *((c, rows[name]) for c, name in kept)])
    if step is not None:
        combine([(1.0, rows["x"]), (step, y)], out=rows["x"])
    if raw is not None:
        rows[raw] = u
    rows[out] = y
    return {name: row[0] for name, row in rows.items()}


def fused(layout, rows, noise, factor, weight, kept, out, raw, step):
    rows = {name: row.clone() for name, row in rows.items()}
    found = release_(
        rows["sum"],
        layout,
        noise,
        factor,
        weight=weight,
        kept=[(c, rows[name]) for c, name in kept],
        out=rows[out],
        raw=None if raw is None else rows[raw],
        step=None if step is None else (step, rows["x"]),
    )
    assert found is rows[out]
    return rows


@st.composite
def releases(draw):
    names = [f"r{k}" for k in range(draw(st.integers(0, 4)))]
    coefficients = st.floats(-2, 2, width=32)
    written = draw(st.permutations(["sum", "fresh", *names]))
    return {
        "noise": parts(draw(st.integers(0, 6))),
        "factor": draw(coefficients),
        "weight": draw(st.one_of(st.just(1.0), coefficients)),
        "kept": [(draw(coefficients), name) for name in names],
        "out": written[0],
        "raw": written[1] if draw(st.booleans()) else None,
        "step": draw(st.one_of(st.none(), coefficients)),
    }


def some_rows(layout, dtype):
    names = ["sum", "fresh", "x", "r0", "r1", "r2", "r3"]
    return {name: random_row(layout, dtype, seed) for seed, name in enumerate(names)}


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=4), release=releases())
def test_one_pass_has_the_bits_of_the_passes_it_replaces(dtype, sizes, release):
    layout = layout_of(sizes, dtype)
    rows = some_rows(layout, dtype)
    expected, found = reference(layout, rows, **release), fused(layout, rows, **release)
    for name in rows:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=3), release=releases())
def test_16_bit_rows_are_rounded_once_from_float32(dtype, sizes, release):
    layout = layout_of(sizes, dtype)
    rows = some_rows(layout, dtype)
    found = fused(layout, rows, **release)
    wide = fused(layout, {name: row.float() for name, row in rows.items()}, **release)
    for name in rows:
        assert torch.equal(found[name], wide[name].to(dtype)), name


def test_plain_torch_agrees_to_rounding():
    layout = layout_of([5000])
    rows = some_rows(layout, torch.float32)
    noise = parts(4)
    z = torch.zeros(layout.d, dtype=torch.float64)
    for seed, p in noise:
        perturb_(z, layout, seed, p.step, p.probe, p.coefficient)
    u = 0.01 * (rows["sum"].double() + z)
    y = torch.lerp(rows["r0"].double(), u, 0.1)
    x = rows["x"].double() - 0.5 * y
    kept = [(0.9, "r0")]
    found = fused(layout, rows, noise, 0.01, 0.1, kept, out="r0", raw=None, step=-0.5)
    # A few roundings of numbers below 8, each by half of 2^-21 at most.
    torch.testing.assert_close(found["r0"].double(), y, rtol=0, atol=2**-20)
    torch.testing.assert_close(found["x"].double(), x, rtol=0, atol=2**-20)


def test_padding_and_the_memory_around_rows_stay_as_they_are():
    layout = layout_of([3, 100, 1])
    memory = torch.full((4, layout.d + 32), 5.0)
    row, past, raw, x = (m[16:-16] for m in memory)
    release_(row, layout, parts(4), 0.5, kept=[(0.5, past)], out=past, raw=raw, step=(0.1, x))
    inside = torch.zeros(layout.d + 32, dtype=torch.bool)
    for s in layout.slices:
        inside[16 + s.begin : 16 + s.end] = True
    assert (memory[:, ~inside] == 5).all()
    assert (memory[1:, inside] != 5).all()
    assert (memory[0] == 5).all()  # the sum, which nothing was written to


def one_call(count, dtype):
    """A release of odd pieces; returns what it wrote."""
    generator = torch.Generator().manual_seed(0)
    row, past, raw, x = torch.randn(4, count, generator=generator).to(dtype)
    pieces = [Piece(1, 5000, 7, 0), Piece(5001, count - 5001, 130, 9)]
    noise = [(Direction("normal", 77, (1, part)), 0.5) for part in range(4)]
    native.release_sum(
        row, pieces, noise, 0.1, weight=0.3, kept=[(0.7, past)], out=past, raw=raw, step=(-0.1, x)
    )
    return torch.stack([past, raw, x])


@pytest.mark.parametrize("dtype", [*EXACT, *ROUNDED], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    found = []
    try:
        for threads in (1, 2, 5):
            native.use_threads(threads)
            found.append(one_call((1 << 18) + 3, dtype))
    finally:
        native.use_threads(None)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


DIGEST = """
import hashlib, sys
sys.path.insert(0, {folder!r})
from gossamer.runtime import native
from test_release import EXACT, ROUNDED, one_call, torch
digest = hashlib.sha256()
for dtype in (*EXACT, *ROUNDED):
    digest.update(one_call(20_011, dtype).view(torch.uint8).numpy().tobytes())
print(native.build_info()["instruction_set"], digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    found = {}
    for isa in ("baseline", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", DIGEST.format(folder=str(Path(__file__).parent))],
            env={**os.environ, "GOSSAMER_ISA": isa},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        used, digest = done.stdout.split()
        found[used] = digest  # a machine without avx512 falls back to avx2
    assert len(set(found.values())) == 1, found
    assert "baseline" in found


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (lambda m: {"out": m[1, :48].double()}, r"rows must be \(48,\) torch.float32"),
        (lambda m: {"kept": [(1.0, m[1, :32])]}, r"rows must be \(48,\)"),
        (lambda m: {"raw": m[1, ::2][:48]}, "rows must be contiguous"),
        (lambda m: {"step": (1.0, m[0, 16:64])}, "overlaps another in part"),
        (lambda m: {"out": m[1, :48], "kept": [(1.0, m[1, 16:64])]}, "overlaps another in part"),
        (lambda m: {"raw": m[0, :48]}, "two results would be written to one row"),
        (lambda m: {"out": m[1, :48], "step": (1.0, m[1, :48])}, "two results"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_anything_is_written(fields, message):
    layout = layout_of([48])
    memory = torch.ones(2, 128)
    with pytest.raises(ValueError, match=f"release_sum: .*{message}"):
        release_(memory[0, :48], layout, parts(2), 1.0, **fields(memory))
    assert (memory == 1).all()


# --- GPU ------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not native.build_info()["cuda_kernels"], reason="built without CUDA")
@pytest.mark.parametrize("count", [0, 4, 40])  # beyond 16 they travel through device memory
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [*EXACT, *ROUNDED], ids=str)
def test_the_gpu_agrees_with_the_cpu(dtype, shift, count):
    layout = layout_of([700, 25, 1, 100_003], dtype)
    noise = parts(count)
    rows = torch.stack([random_row(layout, dtype, seed) for seed in range(4 + count)])
    memory = torch.zeros(len(rows), layout.d + 16, dtype=dtype)
    found = {}
    for device in ("cpu", "cuda"):
        moved = memory.to(device)[:, shift : shift + layout.d]
        moved.copy_(rows)
        row, raw, x, past, *others = moved
        kept = [(0.5, past), *((0.1 / len(others), other) for other in others)]
        release_(row, layout, noise, 0.1, kept=kept, out=past, raw=raw, step=(-0.1, x))
        found[device] = moved.cpu()
    if count == 0:  # no normals: every bit
        assert torch.equal(found["cuda"], found["cpu"])
    elif dtype in EXACT:  # normals differ by 1e-6, and their coefficients add up to 3 at most
        assert (found["cuda"] - found["cpu"]).abs().max() <= 3e-6
    else:
        torch.testing.assert_close(found["cuda"], found["cpu"], rtol=2**-7, atol=1e-3)


def test_sums_of_no_element_are_left_alone():
    row = torch.ones(8)
    native.release_sum(row, [Piece(3, 0, 5, 0)], [(Direction("normal", 0, (0, 0)), 1.0)], 2.0)
    assert np.array_equal(row.numpy(), np.ones(8, np.float32))
