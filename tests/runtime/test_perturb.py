"""Directions in parameter space: the specification's words, its arithmetic, any shard of a row."""

import os
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.runtime import native
from gossamer.runtime.native import Direction, Piece
from gossamer.runtime.perturb import Mask, Probe, direction_, perturb_, update_
from gossamer.runtime.rows import RowLayout

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DISTRIBUTIONS = ["normal", "rademacher", "uniform"]
SEED, STEP, PROBE = 0x0123456789ABCDEF, 7, 3
EVERY_WORD = np.arange(1 << 23, dtype=np.uint32) << 9  # one for each value of u


@pytest.fixture(scope="module")
def layout():
    """Slices of 700, 25, 1 and 1500 elements, so that padding follows three of them."""
    module = nn.Module()
    for name, shape in (("a", (20, 35)), ("b", (25,)), ("c", (1,)), ("d", (1500,))):
        setattr(module, name, nn.Parameter(torch.zeros(shape)))
    return RowLayout(module)


def random_row(layout, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    row = torch.zeros(layout.d, dtype=dtype)
    for view in layout.views(row):
        view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))
    return row


# --- an independent reference: the specification word by word, in numpy ---------------------------


def philox(block, c1, c2, c3, seed):
    """Return the four words of each block, (blocks, 4) uint32."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0 = np.asarray(block, np.uint64) & low
    c1, c2, c3 = (np.uint64(word) for word in (c1, c2, c3))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & low
        c2, c3 = (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def reference_words(positions, tensor, step, probe, seed=SEED):
    blocks = philox(positions // 4, tensor, step, probe, seed)
    return np.take_along_axis(blocks, (positions % 4)[:, None].astype(int), axis=1)[:, 0]


def reference_z(positions, tensor, step, probe, distribution="normal", mask=None, seed=SEED):
    """Elements of z in float32, as the specification says."""
    if distribution == "rademacher":
        words = philox(positions // 128, tensor, step, probe, seed)
        word = np.take_along_axis(words, (positions % 128 // 32)[:, None].astype(int), axis=1)
        bit = word[:, 0] >> (positions % 32).astype(np.uint32) & np.uint32(1)
        z = 1 - 2 * bit.astype(np.float32)
    else:
        blocks = philox(positions // 4, tensor, step, probe, seed)
        u = (2 * (blocks >> np.uint32(9)).astype(np.float64) + 1) * 2.0**-24
        if distribution == "normal":
            radius = np.sqrt(-2 * np.log(u[:, 0::2]))
            angle = 2 * np.pi * u[:, 1::2]
            u = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1, 4)
        z = np.take_along_axis(u, (positions % 4)[:, None].astype(int), axis=1)[:, 0]
        z = z.astype(np.float32)
    if mask is not None:
        words = reference_words(positions, tensor, step // mask.interval, 0x80000000, seed)
        z[words.astype(np.int64) < int(mask.sparsity * 2**32)] = 0
    return z


@pytest.mark.parametrize("first", [0, 1, 1000003, 2**33 + 2])
def test_words_are_the_specified_ones(first):
    positions = np.arange(first, first + 1500, dtype=np.uint64)
    found = native.words_(torch.empty(1500, dtype=torch.int32), SEED, (2, STEP, PROBE), first)
    words = found.numpy().view(np.uint32)
    assert np.array_equal(words, reference_words(positions, 2, STEP, PROBE))
    assert np.array_equal(words, native.fill_words(1500, SEED, (2, STEP, PROBE), first))


@pytest.mark.parametrize("mask", [None, Mask(0.3, 4), Mask(0.0), Mask(1.0)], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_directions_are_the_specified_ones(layout, distribution, mask):
    row = torch.full((layout.d,), torch.nan)
    direction_(row, layout, SEED, STEP, PROBE, distribution, mask)
    used = torch.zeros(layout.d, dtype=torch.bool)
    for s in layout.slices:
        positions = np.arange(s.shape.numel(), dtype=np.uint64)
        expected = reference_z(positions, s.tensor, STEP, PROBE, distribution, mask)
        # Normals: cos near a quarter turn loses what 2 pi u was rounded by in the reference.
        tolerance = {"rtol": 2**-23, "atol": 1e-15} if distribution == "normal" else {}
        np.testing.assert_allclose(row[s.begin : s.end], expected, **({"rtol": 0} | tolerance))
        used[s.begin : s.end] = True
    assert not row[~used].any()


def test_the_specified_mask_is_that_of_its_step(layout):
    rows = [
        direction_(torch.zeros(layout.d), layout, SEED, step, 0, "rademacher", Mask(0.5, 4)) == 0
        for step in (3, 4, 7)
    ]
    assert torch.equal(rows[1], rows[2])
    assert not torch.equal(rows[0], rows[1])


# --- normals --------------------------------------------------------------------------------------


def exact_normals(w0, w1):
    """Both normals of each pair of words in float64, angles reduced exactly."""
    u = (2 * (w0.astype(np.int64) >> 9) + 1) * 2.0**-24
    turn = 2 * (w1.astype(np.int64) >> 9) + 1  # in units of 2^-24
    quarter = (turn + 2**21) >> 22
    x = (turn - (quarter << 22)) / 2**22
    s, c = np.sin(np.pi / 2 * x), np.cos(np.pi / 2 * x)
    radius = np.sqrt(-2 * np.log(u))
    cosine = np.choose(quarter & 3, [c, -s, -c, s])
    sine = np.choose(quarter & 3, [s, c, -s, -c])
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


@pytest.mark.parametrize("which", ["radius", "angle"])
def test_every_normal_is_rounded_right(which):
    other = np.full_like(EVERY_WORD, 987654321)
    pair = [EVERY_WORD, other] if which == "radius" else [other, EVERY_WORD]
    found = native.normals_of_words(np.stack(pair, axis=1).reshape(-1))
    expected = exact_normals(*pair)
    # Half a unit in the last place is 2^-24. A double within 2^-43 of the exact value crosses the
    # middle between two float32 about once in 2^18 values at worst.
    assert np.abs(found / expected - 1).max() < 2**-24 * (1 + 1e-5)
    assert (found != expected.astype(np.float32)).sum() < 16


def test_normals_have_the_moments_of_the_distribution_and_its_bound(layout):
    z = native.fill_random(
        torch.empty(1 << 20, dtype=torch.float64),
        [Piece(0, 1 << 20, 0, 0)],
        Direction("normal", SEED, (0, 0)),
    )
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3)):
        values = z**power
        assert abs(values.mean() - expected) < 5 * values.std() / 2**10  # a fixed stream
    assert z.abs().max() < 5.77
    bound = native.normals_of_words(np.zeros(4, np.uint32))
    assert 5.76 < bound[0] < 5.77


# --- arithmetic -----------------------------------------------------------------------------------


def nearest(value, dtype):
    """The float nearest to a Fraction, ties to even, by comparing neighbours."""
    guess = torch.tensor(float(value), dtype=torch.float64).to(dtype)
    bits = guess.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[guess.element_size()])
    around = [guess, (bits + 1).view(dtype), (bits - 1).view(dtype)]
    finite = [x for x in around if torch.isfinite(x)]
    return min(
        finite,
        key=lambda x: (
            abs(Fraction(float(x)) - value),
            int(x.view(bits.dtype)) & 1,
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_perturbation_is_one_fused_multiply_add(layout, distribution, dtype):
    row = random_row(layout, dtype)
    z = direction_(torch.zeros(layout.d), layout, SEED, STEP, PROBE, distribution)
    scale = 0.37
    a = Fraction(float(torch.tensor(scale, dtype=dtype)))
    found = perturb_(row.clone(), layout, SEED, STEP, PROBE, scale, distribution)
    for s in layout.slices:
        for i in range(s.begin, s.end, 3):
            exact = a * Fraction(float(z[i])) + Fraction(float(row[i]))
            assert found[i] == nearest(exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_16_bit_rows_are_rounded_once_from_float32(layout, distribution, dtype):
    row = random_row(layout, dtype)
    single = perturb_(row.float(), layout, SEED, STEP, PROBE, 1e-2, distribution)
    found = perturb_(row.clone(), layout, SEED, STEP, PROBE, 1e-2, distribution)
    assert torch.equal(found, single.to(dtype))


def fused(a, z, x):
    """Fma in float32 by numpy: exact in long double, whose 64 bits hold what matters."""
    exact = np.longdouble(a) * z.astype(np.longdouble) + x.astype(np.longdouble)
    return exact.astype(np.float32)


@pytest.mark.parametrize("mask", [None, Mask(0.25, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_update_of_many_probes_is_the_reference_to_the_bit(layout, dtype, mask):
    probes = [Probe(5, 0, 0.37), Probe(5, 1, -0.11), Probe(6, 0, 1e-3), Probe(9, 2**31 - 1, 3.0)]
    decay = 1e-3
    row = random_row(layout, dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    found = update_(row.clone(), layout, SEED, probes, decay, "rademacher", mask)
    expected = row.clone()
    total = torch.zeros(layout.d, dtype=accumulator)
    for p in probes:
        z = direction_(torch.zeros(layout.d), layout, SEED, p.step, p.probe, "rademacher", mask)
        coefficient = torch.tensor(p.coefficient, dtype=accumulator)
        total += coefficient * z.to(accumulator)  # the product is exact: one rounding, as fma
    wide = row.to(accumulator)
    expected = ((wide - total) - torch.tensor(decay, dtype=accumulator) * wide).to(dtype)
    assert torch.equal(found, expected)


def test_an_update_with_normals_adds_by_fused_multiply_adds(layout):
    probes = [Probe(step, step % 3, 0.1 * (step + 1)) for step in range(100)]
    row = random_row(layout)
    total = np.zeros(layout.d, np.float32)
    for p in probes:
        z = direction_(torch.zeros(layout.d), layout, SEED, p.step, p.probe)
        total = fused(np.float32(p.coefficient), z.numpy(), total)
    x, decay = row.numpy(), np.float32(0.01)
    expected = (x - total) - decay * x
    found = update_(row.clone(), layout, SEED, probes, 0.01)
    # The long double may itself round before float32 does, once in thousands of values.
    differing = (found.numpy() != expected).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert differing < 0.05


def test_no_probe_and_no_decay_change_nothing(layout):
    row = random_row(layout, torch.bfloat16)
    assert torch.equal(update_(row.clone(), layout, SEED, []), row)


# --- shards, threads, padding, instruction sets ---------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(cuts=st.lists(st.integers(0, 2300), max_size=4), kind=st.sampled_from(DISTRIBUTIONS))
def test_any_shard_of_a_row_is_computable_alone(layout, cuts, kind):
    row = random_row(layout, torch.bfloat16)
    mask = Mask(0.2)
    probes = [Probe(1, 2, 0.5), Probe(2, 2, 0.25)]
    whole = perturb_(row.clone(), layout, SEED, 1, 2, 0.1, kind, mask)
    update_(whole, layout, SEED, probes, 0.01, kind, mask)
    places = [0, *sorted(min(c, layout.d) for c in cuts), layout.d]
    parts = []
    for first, last in pairwise(places):
        part = row[first:last].clone()
        perturb_(part, layout, SEED, 1, 2, 0.1, kind, mask, begin=first)
        parts.append(update_(part, layout, SEED, probes, 0.01, kind, mask, begin=first))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_stays_zero(layout, dtype):
    row = random_row(layout, dtype)
    perturb_(row, layout, SEED, 0, 0, 1.0)
    update_(row, layout, SEED, [Probe(0, 0, 1.0)], 0.1)
    padding = torch.ones(layout.d, dtype=torch.bool)
    for s in layout.slices:
        padding[s.begin : s.end] = False
    assert padding.any()
    assert not row[padding].any()


def test_memory_around_a_row_is_left_alone(layout):
    memory = torch.full((layout.d + 3,), 5.0)
    perturb_(memory[1:-2], layout, SEED, 0, 0, 1.0)
    update_(memory[1:-2], layout, SEED, [Probe(0, 0, 1.0)])
    assert memory[[0, -2, -1]].tolist() == [5.0, 5.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_moving_out_of_a_tensor_is_copying_its_parts_and_adding(distribution, dtype):
    tensor = torch.linspace(-1, 1, 200_001).to(dtype)
    direction = Direction(distribution, SEED, (1, 2), (3, 1 << 31, 1 << 30))
    pieces = [Piece(3, 5000, 129, 4), Piece(5003, 150_000, 7, 4), Piece(155_003, 1, 200_000, 4)]
    expected = torch.full((155_007,), 5.0, dtype=dtype)
    found = expected.clone()
    for piece in pieces:
        expected[piece.at :][: piece.length] = tensor[piece.begin :][: piece.length]
    native.add_random(expected, pieces, direction, 0.3)
    kept = tensor.clone()
    assert torch.equal(native.add_random(found, pieces, direction, 0.3, tensor), expected)
    assert torch.equal(tensor, kept)


def test_a_source_that_does_not_fit_is_refused():
    direction, pieces = Direction("normal", 0, (0, 0)), [Piece(0, 4, 2, 0)]
    row = torch.zeros(12)
    for source in (torch.zeros(6, dtype=torch.float64), torch.zeros(12)[::2], torch.zeros(2, 3)):
        with pytest.raises(
            ValueError, match=r"source must be \(k,\) contiguous torch.float32 on cpu"
        ):
            native.add_random(row[:4], pieces, direction, 1.0, source)
    with pytest.raises(ValueError, match="a piece is not inside a source of 5 elements"):
        native.add_random(row[:4], pieces, direction, 1.0, torch.zeros(5))
    with pytest.raises(ValueError, match="row and source overlap"):
        native.add_random(row[:4], pieces, direction, 1.0, row[3:])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_bits_do_not_depend_on_the_number_of_threads(distribution):
    count = (1 << 18) + 5
    direction = Direction(distribution, SEED, (1, 2), (3, 1 << 31, 1 << 30))
    pieces = [Piece(1, 1000, 7, 0), Piece(1001, count - 1001, 5, 1)]
    rows = []
    try:
        for threads in (1, 2, 5):
            native.use_threads(threads)
            row = native.add_random(torch.ones(count), pieces, direction, 0.1)
            rows.append(native.subtract_random(row, pieces, [(direction, 0.3)], 0.1))
    finally:
        native.use_threads(None)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


DIGEST = """
import hashlib, torch
from gossamer.runtime import native
from gossamer.runtime.native import Direction, Piece
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for distribution in ("normal", "rademacher", "uniform"):
        direction = Direction(distribution, 77, (1, 2), (3, 1 << 31, 1 << 30))
        pieces = [Piece(0, 5001, 3, 0), Piece(5001, 60000, 129, 9)]
        row = native.fill_random(torch.zeros(65001, dtype=dtype), pieces, direction)
        native.add_random(row, pieces, Direction(distribution, 78, (5, 6)), 0.37)
        native.subtract_random(row, pieces, [(direction, 0.3), (direction, 0.7)], 0.1)
        digest.update(row.view(torch.uint8).numpy().tobytes())
digest.update(native.fill_words(1001, 5, (1, 2, 3), 6).tobytes())
name = native.build_info()["instruction_set"]
"""


def test_every_instruction_set_gives_the_same_bits():
    here: dict = {}
    exec(DIGEST, here)
    found = {here["name"]: here["digest"].hexdigest()}
    for isa in {"baseline", "avx2"} - set(found):
        done = subprocess.run(
            [sys.executable, "-c", DIGEST + "print(name, digest.hexdigest())"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "GOSSAMER_ISA": isa},
        )
        name, digest = done.stdout.split()
        found[name] = digest
    assert len(set(found.values())) == 1
    assert "baseline" in found


# --- refusals -------------------------------------------------------------------------------------


def test_numbers_out_of_range_are_refused(layout):
    row = torch.zeros(layout.d)
    with pytest.raises(ValueError, match=r"probe: must be in 0..2\*\*31 - 1, got 2147483648"):
        perturb_(row, layout, SEED, 0, 2**31, 1.0)
    with pytest.raises(ValueError, match=r"counter: must be in 0..2\*\*32 - 1, got -1"):
        perturb_(row, layout, SEED, -1, 0, 1.0)
    with pytest.raises(ValueError, match=r"key: must be in 0..2\*\*64 - 1, got -1"):
        perturb_(row, layout, -1, 0, 0, 1.0)
    with pytest.raises(ValueError, match=r"mask.sparsity: must be in 0..1, got 1.5"):
        Mask(1.5)
    with pytest.raises(ValueError, match=r"mask.interval: must be at least 1, got 0"):
        Mask(0.5, 0)
    with pytest.raises(ValueError, match="distribution: 'gauss' is not one of"):
        perturb_(row, layout, SEED, 0, 0, 1.0, "gauss")


def test_rows_that_do_not_fit_are_refused(layout):
    with pytest.raises(ValueError, match="are not in a row of"):
        perturb_(torch.zeros(layout.d + 1), layout, SEED, 0, 0, 1.0)
    with pytest.raises(ValueError, match="are not in a row of"):
        perturb_(torch.zeros(4), layout, SEED, 0, 0, 1.0, begin=layout.d - 3)
    for row in (torch.zeros(8, dtype=torch.int64), torch.zeros(16)[::2], torch.zeros(2, 4)):
        with pytest.raises(ValueError, match=r"add_random: row must be \(m,\) contiguous"):
            perturb_(row, layout, SEED, 0, 0, 1.0)
    direction = Direction("normal", 0, (0, 0))
    with pytest.raises(ValueError, match="is not inside a row of 4 elements"):
        native.fill_random(torch.zeros(4), [Piece(2, 3, 0, 0)], direction)
    with pytest.raises(ValueError, match=r"is not inside a stream of 2\*\*34 elements"):
        native.fill_random(torch.zeros(4), [Piece(0, 4, 2**34 - 3, 0)], direction)


# --- GPU ------------------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(
    not native.build_info()["cuda_kernels"], reason="built without CUDA"
)


@pytest.mark.cuda
@needs_kernels
@pytest.mark.parametrize("begin", [0, 1, 6, 127])
@pytest.mark.parametrize("count", [0, 1, 5, 1000, 100_003])
def test_words_on_the_gpu_are_those_of_the_cpu(count, begin):
    rows = [torch.empty(count, dtype=torch.int32, device=d) for d in ("cpu", "cuda")]
    cpu, gpu = (native.words_(row, SEED, (2, STEP, PROBE), begin) for row in rows)
    assert torch.equal(gpu.cpu(), cpu)


@pytest.mark.cuda
@needs_kernels
@pytest.mark.parametrize("mask", [None, Mask(0.3)], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpu_agrees_with_the_cpu(layout, dtype, distribution, mask):
    for begin, end in ((0, layout.d), (3, layout.d - 5)):
        row = random_row(layout, dtype)[begin:end]
        probes = [Probe(1, k, 0.1 * (k + 1)) for k in range(70)]  # more than fit into a launch
        results = []
        for device in ("cpu", "cuda"):
            x = row.to(device).clone()
            perturb_(x, layout, SEED, 1, 2, 0.5, distribution, mask, begin)
            z = direction_(torch.empty_like(x), layout, SEED, 1, 2, distribution, mask, begin)
            few = update_(x.clone(), layout, SEED, probes[:3], 0.1, distribution, mask, begin)
            update_(x, layout, SEED, probes, 0.1, distribution, mask, begin)
            results.append([t.cpu() for t in (z, few, x)])
        for cpu, gpu in zip(*results, strict=True):
            if distribution != "normal":
                assert torch.equal(cpu, gpu)
            elif dtype in (torch.float32, torch.float64):
                scale = 1 if cpu is results[0][0] else 70 * 7  # coefficients add up to 250
                assert (cpu - gpu).abs().max() <= scale * 1e-6
            else:
                torch.testing.assert_close(cpu, gpu, rtol=2**-7, atol=1e-3)
