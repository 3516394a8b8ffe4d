"""8-bit codes, and Adam whose moments are kept in them."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zeroth_order_problems import network, program

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.estimates import Origin
from gossamer.algorithms.optimizers.adam import AdamW
from gossamer.algorithms.optimizers.adam8bit import Adam8bit
from gossamer.algorithms.optimizers.dynamic_codes import (
    codebook,
    coded_adam_torch,
    decode,
    encode_,
)
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.tasks.bundled import Digits
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.runtime import Communicator, ConfigError, RowLayout, StackedTransport
from gossamer.runtime.native import CODED_BLOCK, CodedMoment, coded_adam, use_threads
from gossamer.topologies import build

FACTORS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def communicator(ranks):
    return Communicator(build("complete", ranks), StackedTransport())


def moment(count, signed):
    codes = torch.zeros(count, dtype=torch.uint8)
    return CodedMoment(codes, torch.zeros(-(-count // CODED_BLOCK)), codebook(signed))


def copy_of(m):
    return CodedMoment(m.codes.clone(), m.scales.clone(), m.book)


def gradients(count, dtype, steps=6, seed=0):
    """Return gradients of many sizes, with blocks of zeros."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, steps, count, generator=generator)
    grads = normal() * torch.exp(4 * normal())
    grads[:, :300] = 0
    return grads.to(dtype)


# --- the codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_a_codebook_has_256_values_in_order(signed):
    values = codebook(signed).values
    assert values.shape == (256,)
    assert (values.diff() > 0).all()
    assert 0.0 in values
    assert values[-1] == 1.0
    if signed:
        assert torch.equal(values[:-1], torch.sort(-values[:-1]).values)  # all but 1 are mirrored
    else:
        assert values[0] == 0.0
    # The largest magnitudes are the finest: of [.1, 1] there are 64 or 128 middles.
    assert int((values > 0.1).sum()) == (64 if signed else 128) + 1
    assert float(values[values > 0].min()) == pytest.approx(0.55e-6 if signed else 0.325e-6)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("keeps_positive", [True, False])
def test_at_most_one_bound_lies_among_floats_that_share_a_cell(signed, keeps_positive):
    book = codebook(signed, keeps_positive=keeps_positive)
    bits = np.arange(2**16, dtype=np.uint32) << 16
    ends = np.stack([bits, bits | 0xFFFF]).view(np.float32)
    finite = np.isfinite(ends).all(axis=0)
    least, most = np.sort(ends[:, finite], axis=0)
    bounds, cells = book.bounds.numpy()[:-1], book.cells.numpy()[finite]
    below = np.searchsorted(bounds, least)
    assert (below == cells).all()
    assert (np.searchsorted(bounds, most) - below).max() == 1


@pytest.mark.parametrize("signed", [True, False])
@given(seed=st.integers(0, 2**31), exponent=st.floats(-30, 30), spread=st.floats(0, 8))
def test_what_is_decoded_is_within_half_a_gap(signed, seed, exponent, spread):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 1000, (), generator=generator))
    normal = partial(torch.randn, count, generator=generator)
    x = normal() * torch.exp(spread * normal()) * 10.0**exponent
    x = (x if signed else x.abs()).clamp(-3e38, 3e38)
    coded = encode_(moment(count, signed), x)
    values = coded.book.values.double()
    for b in range(len(coded.scales)):
        part = slice(b * CODED_BLOCK, (b + 1) * CODED_BLOCK)
        largest = x[part].abs().max()
        assert coded.scales[b] == largest
        codes = coded.codes[part].int()
        gaps = values.diff()
        above = torch.cat([gaps, gaps[-1:]])[codes]
        below = torch.cat([gaps[:1], gaps])[codes]
        error = x[part].double() - values[codes] * float(largest)
        half = torch.where(error > 0, above, below) / 2 * float(largest)
        # A quotient is rounded, and so is the bound it is compared with: 2^-23 of the largest.
        assert (error.abs() <= half + 2.0**-23 * float(largest)).all()


@pytest.mark.parametrize("signed", [True, False])
def test_values_of_the_codebook_come_back_to_the_bit(signed):
    values = codebook(signed).values
    coded = encode_(moment(256, signed), values)
    assert torch.equal(decode(coded), values)
    assert torch.equal(coded.codes, torch.arange(256, dtype=torch.uint8))


def test_the_code_of_0_can_be_kept_for_0():
    x = torch.tensor([1.0, 1e-3, 2e-7, 1e-7, 1e-30, 0.0])
    nearest, positive = (
        decode(encode_(moment(6, False)._replace(book=codebook(False, keeps_positive=p)), x))
        for p in (False, True)
    )
    least = codebook(False).values[1]
    assert nearest[2:].tolist() == [least, 0, 0, 0]
    assert positive[2:].tolist() == [least, least, least, 0]
    assert torch.equal(nearest[:2], positive[:2])


def test_zeros_have_a_scale_of_0_and_come_back():
    coded = moment(600, True)
    coded.codes.fill_(77)
    x = torch.zeros(600)
    x[300:] = torch.linspace(-1, 1, 300)
    encode_(coded, x)
    assert coded.scales[0] == 0
    assert not decode(coded)[:300].any()
    coded.codes.fill_(77)
    v = moment(600, False)
    coded_adam(coded, v, torch.zeros(600), torch.empty(600), **FACTORS, t=1)
    assert not decode(coded)[:256].any()


# --- the kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 255, 256, 257, 5000, 300_001])
def test_the_kernel_is_the_formula_in_float32(count, dtype):
    m, v = moment(count, True), moment(count, False)
    reference = copy_of(m), copy_of(v)
    one = np.float32(1)
    for t, grad in enumerate(gradients(count, dtype, steps=4), start=1):
        first, second = decode(m).numpy(), decode(v).numpy()
        g = grad.float().numpy()
        first = np.float32(0.9) * first + np.float32(1 - 0.9) * g
        second = np.float32(0.999) * second + np.float32(1 - 0.999) * (g * g)
        up = np.float32(1 / (1 - 0.9**t)) * first
        down = np.sqrt(np.float32(1 / (1 - 0.999**t)) * second) + np.float32(1e-8) * one
        out, expected = torch.empty_like(grad), torch.from_numpy(up / down).to(dtype)
        assert coded_adam(m, v, grad, out, **FACTORS, t=t) is out
        assert torch.equal(out, expected)
        theirs = coded_adam_torch(*reference, grad, torch.empty_like(grad), **FACTORS, t=t)
        # torch's root may be an ulp off
        rtol = {torch.bfloat16: 2.0**-7}.get(dtype, 2.0**-22)
        torch.testing.assert_close(theirs, out, rtol=rtol, atol=0)
        for ours, plain in zip((m, v), reference, strict=True):
            assert torch.equal(ours.codes, plain.codes)
            assert torch.equal(ours.scales, plain.scales)


def digest():
    """Return what the kernel makes of some gradients, as text."""
    parts = []
    for dtype in DTYPES:
        m, v = moment(700_001, True), moment(700_001, False)
        for t, grad in enumerate(gradients(700_001, dtype, steps=2), start=1):
            coded_adam(m, v, grad, grad, **FACTORS, t=t)
        parts += [grad.view(torch.uint8), m.codes, v.codes, m.scales.view(torch.uint8)]
    return str([int(p.long().mul(torch.arange(p.numel()) % 9973 + 1).sum()) for p in parts])


_DIGEST = """
import sys
sys.path.insert(0, {folder!r})
from test_adam8bit import digest
from gossamer.runtime.native import build_info
print(build_info()["instruction_set"], digest(), sep=";")
"""


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    try:
        found = {}
        for threads in (1, 2, 5):
            use_threads(threads)
            found[threads] = digest()
    finally:
        use_threads(None)
    for isa in ("baseline", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", _DIGEST.format(folder=str(Path(__file__).parent))],
            env={**os.environ, "GOSSAMER_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        used, text = done.stdout.strip().split(";")
        found[used] = text  # a machine without avx512 falls back to avx2
    assert "baseline" in found
    assert len(set(found.values())) == 1


def test_a_gradient_that_is_not_finite_shows():
    m, v = moment(512, True), moment(512, False)
    grad = torch.ones(512)
    grad[3] = torch.nan
    coded_adam(m, v, grad, torch.empty(512), **FACTORS, t=1)
    assert decode(m)[:256].isnan().all()
    assert decode(m)[256:].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(600, dtype=torch.int32)}, "dtype torch.int32 is not one of"),
        ({"grad": torch.zeros(1200)[::2]}, "grad must be contiguous"),
        ({"out": torch.zeros(599)}, r"out must be \(600,\)"),
        ({"out": torch.zeros(600, dtype=torch.float64)}, r"out must be \(600,\) torch.float32"),
        ({"m": moment(500, True)}, r"m.codes must be \(600,\) torch.uint8"),
        ({"v": moment(600, True)._replace(scales=torch.zeros(2))}, r"v.scales must be \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    fit = {
        "m": moment(600, True),
        "v": moment(600, False),
        "grad": torch.zeros(600),
        "out": torch.zeros(600),
    }
    with pytest.raises(ValueError, match=message):
        coded_adam(**(fit | change), **FACTORS, t=1)


# --- the optimizer ------------------------------------------------------------------------------


def layout_of(dtype=torch.float32):
    module = nn.Sequential(nn.Linear(70, 90), nn.Linear(90, 5), nn.Linear(5, 1000))
    return RowLayout(module.to(dtype))


def rows_of(layout, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(ranks, layout.d, dtype=layout.dtype)
    for row in rows:
        for view in layout.views(row):
            view.copy_(torch.randn(view.shape, generator=generator))
    return rows


def made(layout, **fields):
    optimizer = Adam8bit(**{"lr": 0.1} | fields)
    optimizer.know(layout)
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_decodes_moves_and_encodes_each_parameter(dtype):
    layout = layout_of(dtype)
    optimizer = made(layout, weight_decay=0.1)
    x, comm = rows_of(layout, 2, seed=0), communicator(2)
    state, plain = optimizer.init(x), AdamW(lr=0.1, weight_decay=0.1)
    exact = x.float()
    kept = plain.init(exact)
    for k in range(3):
        grad = rows_of(layout, 2, seed=k + 1)
        optimizer.update_(state, x, grad, comm)
        plain.update_(kept, exact, grad.float(), comm)
        for s in layout.slices:
            coded = s.shape.numel() >= 4096
            assert coded == (s.name in ("0.weight", "2.weight"))
            found, full = x[:, s.begin : s.end].float(), exact[:, s.begin : s.end]
            if not coded and dtype == torch.float32:  # float32 moments: AdamW itself
                torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-6)
            elif k == 0:  # nothing was encoded yet
                near = 1e-6 if dtype == torch.float32 else 3e-2
                torch.testing.assert_close(found, full, rtol=near, atol=near)
    assert state.t == 3


def test_a_moment_takes_a_byte_per_element_and_a_scale_per_block():
    layout = layout_of()
    state = made(layout).init(torch.zeros(2, layout.d))
    sizes = {s.name: s.shape.numel() for s in layout.slices}
    large = {name: size for name, size in sizes.items() if size >= 4096}
    for m in (state.m, state.v):
        assert m.codes.shape == (2, sum(large.values()))
        assert m.codes.dtype == torch.uint8
        assert m.scales.shape == (2, sum(-(-size // 256) for size in large.values()))
        assert m.small.shape == (2, sum(sizes.values()) - sum(large.values()))
        assert m.scales.dtype == m.small.dtype == torch.float32


def test_rows_do_not_depend_on_their_neighbours_nor_on_the_order_of_parts():
    layout = layout_of()

    def after(ranks, in_parts):
        optimizer, x = made(layout, weight_decay=0.1), rows_of(layout, 3, seed=0)[:ranks]
        x, comm = x.contiguous(), communicator(ranks)
        state = optimizer.init(x)
        for k in range(4):
            grad = rows_of(layout, 3, seed=k + 1)[:ranks].contiguous()
            if not in_parts:
                optimizer.update_(state, x, grad, comm)
                continue
            with optimizer.in_parts(state, x, comm) as update:
                for s in reversed(layout.slices):
                    update(slice(s.begin, s.end), grad[:, s.begin : s.end])
        assert state.t == 4
        return x

    together = after(3, False)
    assert torch.equal(after(1, False), together[:1])
    assert torch.equal(after(3, True), together)


def test_parts_that_are_no_parameters_are_refused():
    layout = layout_of()
    optimizer, x = made(layout), torch.zeros(1, layout.d)
    state = optimizer.init(x)
    with (
        pytest.raises(ConfigError, match=r"adam8bit has blocks within parameters.*columns 0 to 16"),
        optimizer.in_parts(state, x, communicator(1)) as update,
    ):
        update(slice(0, 16), x[:, :16])


def test_directions_are_taken_parameter_by_parameter():
    runs = [program(network(n=2), ZerothOrder(), Adam8bit(lr=0.01)) for _ in range(2)]
    for _ in range(3):
        runs[0].step()
        runs[0].comm.step += 1
        run = runs[1]
        mean = run.oracle.deferred(run.state.x, run._batches()[0]).mean(run.comm).dense()
        optimizer = run.algorithm.optimizer
        optimizer.update_(run.state.optimizer, run.state.x, mean, run.comm)
        run.comm.step += 1
    assert torch.equal(runs[0].state.x, runs[1].state.x)


def test_a_restart_forgets_the_first_moment_alone():
    layout = layout_of()
    optimizer, comm = made(layout), communicator(1)
    x = rows_of(layout, 1, seed=0)
    state = optimizer.init(x)
    optimizer.update_(state, x, rows_of(layout, 1, seed=1), comm)
    before, v = x.clone(), [t.clone() for t in (state.v.scales, state.v.small)]
    optimizer.update_(state, x, torch.zeros_like(x), comm, Origin(restart=True))
    assert torch.equal(x, before)
    assert state.t == 2
    torch.testing.assert_close(state.v.scales, 0.999 * v[0])
    torch.testing.assert_close(state.v.small, 0.999 * v[1])


@pytest.mark.parametrize("second_moment", ["nearest", "positive"])
def test_a_second_moment_that_is_not_lost_bounds_the_update(second_moment):
    layout = layout_of()
    optimizer, comm = made(layout, second_moment=second_moment), communicator(1)
    x = rows_of(layout, 1, seed=0)
    state = optimizer.init(x)
    grad = torch.ones_like(x)
    grad[0, 7] = 1e-4  # its square is 1e-8 of the largest
    optimizer.update_(state, x, grad, comm)
    grad[0, 7] = 0
    before = x.clone()
    optimizer.update_(state, x, grad, comm)
    moved = float((x - before)[0, 7].abs()) / optimizer.lr
    assert moved < 1 if second_moment == "positive" else moved > 100


def test_float16_is_refused():
    with pytest.raises(ConfigError, match=r"adam8bit takes squares .* underflow in float16"):
        made(layout_of()).init(torch.zeros(1, 8, dtype=torch.float16))


def test_all_reduce_keeps_ranks_equal_to_the_bit():
    task = Digits(model="mlp", hidden=[64]).build(3, seed=0)
    oracle = Backprop(batch_size=8)
    run = program(task, oracle, algorithm=AllReduce(optimizer=Adam8bit(lr=0.01)), n=3)
    for _ in range(4):
        run.step()
        run.comm.step += 1
    assert run.state.optimizer.m.codes.shape[1] == 4096
    assert torch.equal(run.state.x, run.state.x[:1].expand_as(run.state.x))
