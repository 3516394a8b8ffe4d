"""Training with weights B A + S: with every kind of algorithm and oracle, on several ranks."""

import math

import pytest
import torch
from language_models_for_tests import make_model
from pydantic import TypeAdapter
from torch import nn

from gossamer.algorithms.low_rank.layer import RestartedLinear
from gossamer.algorithms.low_rank.restarts import Restarts
from gossamer.algorithms.low_rank.sltrain import layers_of, to_dense
from gossamer.algorithms.problems import Batch
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.tasks.schemes import SchemeField
from gossamer.launch.config import Experiment, resolve
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.runtime.loop import LoopOptions, run_loop
from gossamer.runtime.rows import Slice

pytest.importorskip("transformers", reason="needs the extra: gossamer[huggingface]")

SLTRAIN = {"name": "sltrain", "rank": 2, "density": 0.1}
RELORA = {"name": "relora", "rank": 2, "every": 2, "dropout": 0.0}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{k} times {k} is {k * k}. " for k in range(200)))
    return path


def values(text, scheme=SLTRAIN, algorithm="all-reduce", ranks=2, steps=4, **sections):
    task = {"name": "pretraining", "data": str(text), "context": 8, "scheme": scheme}
    task |= {"model": {"hidden": 8, "layers": 1, "heads": 2, "ffn": 12}, "dtype": "float64"}
    task |= sections.pop("task", {})
    return {
        "task": task,
        "oracle": {"name": "backprop", "batch_size": 4},
        "algorithm": {"name": algorithm},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "ranks": ranks,
        "steps": steps,
        **sections,
    }


def started(given):
    experiment = Experiment(
        resolve({k: v for k, v in given.items() if v is not None}), given["ranks"]
    )
    comm = Communicator(
        experiment.topology, StackedTransport(), seed=0, steps=experiment.config.steps
    )
    problem = experiment.task.build(comm.n, 0)
    options = {"per_rank": False, "examples": 16}
    return TrainingProgram(
        comm, problem, experiment.oracle(), experiment.algorithm, options
    ).start()


def trained(given):
    program, records = started(given), []
    steps = given["steps"]
    run_loop(program.comm, program, LoopOptions(steps, 1, steps, 0), log=records.append)
    return program, records


def weights_of(program, row):
    """The dense weights of the layers at a row."""
    program.layout.bind(program.problem.module, row)
    return [layer.dense_weight().detach() for _, layer in layers_of(program.problem.module)]


# --- over ranks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["dsgd", "d-nasa", "gradient-tracking", "qg-dsgdm"])
def test_factors_train_under_every_kind_of_algorithm(text, algorithm):
    optimizer = None if algorithm == "d-nasa" else {"name": "sgd", "lr": 0.3}
    program, records = trained(
        values(text, algorithm=algorithm, ranks=4, steps=60, optimizer=optimizer)
    )
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    rows, mean = program.state.x, program.state.x.mean(0)
    of_means = weights_of(program, mean)
    means = [
        torch.stack(w).mean(0) for w in zip(*(weights_of(program, r) for r in rows), strict=True)
    ]
    apart = sum((a - b).square().sum() for a, b in zip(means, of_means, strict=True)).sqrt()
    program.layout.bind(program.problem.module, mean)
    whole = sum(
        (layer.scale * layer.B @ layer.A).detach().square().sum()
        for _, layer in layers_of(program.problem.module)
    ).sqrt()
    gap = (apart / whole).item()
    assert records[-1]["product_gap"] == pytest.approx(gap, rel=1e-6, abs=1e-12)
    assert records[-1]["product_gap"] > 0


def test_the_gap_is_the_mean_product_of_deviations_and_vanishes_with_their_square(text):
    program = started(values(text, algorithm="dsgd", ranks=4, steps=1))
    figures = program.problem.figures
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(1, program.layout.d, generator=generator, dtype=torch.float64)
    apart = torch.randn(4, program.layout.d, generator=generator, dtype=torch.float64)
    apart -= apart.mean(0)
    gaps = []
    for scale in (1.0, 0.1):
        rows = center + scale * apart
        found = figures(program.comm, program.layout, rows, rows.mean(0, keepdim=True))
        gaps.append(found["product_gap"])
    assert gaps[1] == pytest.approx(0.01 * gaps[0], rel=1e-9)
    one = [
        dict(zip((s.name for s in program.layout.slices), program.layout.views(r), strict=True))
        for r in center + apart
    ]
    wanted = whole = 0.0
    for name in (n[:-2] for n in one[0] if n.endswith(".A")):
        b = torch.stack([p[f"{name}.B"] for p in one])
        a = torch.stack([p[f"{name}.A"] for p in one])
        wanted += ((b @ a).mean(0) - b.mean(0) @ a.mean(0)).square().sum()
        whole += (b.mean(0) @ a.mean(0)).square().sum()
    assert gaps[0] == pytest.approx(math.sqrt(wanted / whole), rel=1e-9)


def test_with_a_frozen_the_mean_of_parameters_is_the_mean_of_weights(text):
    scheme = {**SLTRAIN, "freeze_a": True}
    given = values(text, scheme, algorithm="dsgd", ranks=4, steps=3)
    program, records = trained(given)
    assert "product_gap" not in records[-1]
    rows = program.state.x
    assert not torch.equal(rows[0], rows[1])
    each = zip(*(weights_of(program, row) for row in rows), strict=True)
    for several, of_mean in zip(each, weights_of(program, rows.mean(0)), strict=True):
        torch.testing.assert_close(torch.stack(several).mean(0), of_mean, rtol=0, atol=1e-14)


def test_four_ranks_are_one_rank_with_four_times_the_batch(text):
    found = []
    for ranks, batch in ((4, 1), (1, 4)):
        sgd = {"name": "sgd", "lr": 0.3}  # Adam makes much of the rounding of small gradients
        task = {"dtype": "float32", "drop_remainder": True}  # shards of one size
        given = values(text, ranks=ranks, steps=3, optimizer=sgd, task=task)
        program = started(given)
        step = program.algorithm.step
        for k in range(3):
            program.comm.step = k
            examples = program.problem.train[torch.arange(4 * k, 4 * k + 4)]
            shares = [[t[i * batch : (i + 1) * batch] for t in examples] for i in range(ranks)]
            batches = [Batch(tuple(share)) for share in shares]
            step(program.comm, program.oracle, program.state, [batches])
        found.append(program.state.x[0])
    assert (found[0] - found[1]).norm() <= 1e-5 * found[1].norm()


def test_an_all_reduce_sends_the_parameters_gradients_and_no_places(text):
    program, records = trained(values(text, ranks=4, steps=2))
    layout = program.layout
    parameters = sum(p.numel() for p in program.problem.module.parameters())
    assert layout.size == parameters
    # Every rank sends 2 (n - 1) / n of a row of float64, a step.
    assert records[-1]["bytes_sent"] == 2 * 4 * (2 * 3 * layout.d * 8 // 4)


def test_the_gap_is_that_of_weights_where_scales_are_trained_too(text):
    program, records = trained(values(text, {**SLTRAIN, "train_scale": True}, "dsgd", 4, 5))
    rows = program.state.x
    module, layout = program.problem.module, program.layout

    gap = whole = 0.0
    parts = {s.name: s for s in layout.slices}
    for name, _ in layers_of(module):
        b, a, c = (
            rows[:, parts[f"{name}.{k}"].begin : parts[f"{name}.{k}"].end].view(
                4, *parts[f"{name}.{k}"].shape
            )
            for k in ("B", "A", "gain")
        )
        b = b * c.tanh()[..., None]
        gap += ((b @ a).mean(0) - b.mean(0) @ a.mean(0)).square().sum().item()
        whole += (b.mean(0) @ a.mean(0)).square().sum().item()
    assert records[-1]["product_gap"] == pytest.approx(math.sqrt(gap / whole), rel=1e-9)


@pytest.mark.parametrize("scheme", [RELORA, {"name": "low-rank", "rank": 8}])
def test_what_starts_from_a_model_keeps_its_biases(scheme):
    model = make_model("gpt2", 40).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    tokens = torch.arange(6)[None]
    wanted = model(input_ids=tokens).logits
    made = TypeAdapter(SchemeField).validate_python(scheme).apply(model, 0).eval()
    error = (made(input_ids=tokens).logits - wanted).norm() / wanted.norm()
    assert error < (1e-5 if scheme["name"] == "relora" else 0.9)
    biases = [layer.bias for _, layer in layers_of(made)]
    assert all(bias.std() > 0.5 for bias in biases)


# --- other oracles ------------------------------------------------------------------------------


def test_private_training_takes_the_factors(text):
    oracle = [
        {"name": "backprop", "batch_size": 4},
        {"name": "dp", "noise_multiplier": 0.0, "clip_norm": 0.5, "delta": 1e-3, "noise_seed": 0},
    ]
    program, records = trained(values(text, oracle=oracle, steps=2))
    assert program.oracle.inner._per_sample.is_tapped
    assert math.isfinite(records[-1]["test_loss"])


@pytest.mark.parametrize("estimate", ["two-sided", "forward"])
def test_forward_passes_alone_train_the_factors(text, estimate):
    oracle = {"name": "zeroth-order", "batch_size": 16, "estimate": estimate}
    given = values(text, ranks=1, steps=150, oracle=oracle, optimizer={"name": "adam", "lr": 3e-3})
    _, records = trained(given)
    assert records[-1]["test_loss"] < records[0]["test_loss"] - 0.1


def test_many_ranks_in_one_pass_are_each_rank_alone(text):
    found = []
    for vectorize in (False, True):
        oracle = {"name": "backprop", "batch_size": 4, "vectorize": vectorize}
        program, _ = trained(values(text, algorithm="dsgd", oracle=oracle, ranks=3, steps=3))
        found.append(program.state.x)
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


# --- peers --------------------------------------------------------------------------------------


def test_low_rank_starts_at_the_best_approximation_of_the_models_own_weights(text):
    full = started(values(text, "full", ranks=1)).problem.module
    low = started(
        values(text, {"name": "low-rank", "rank": 2, "gain": 0.5}, ranks=1)
    ).problem.module
    dense = dict(full.named_parameters())
    layers = list(layers_of(low))
    assert len(layers) == 7
    for name, layer in layers:
        weight = dense[f"{name}.weight"].float()
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(
            layer.dense_weight().float(), 0.5 * u[:, :2] * s[:2] @ vt[:2], rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            layer.A @ layer.A.t(), layer.B.t() @ layer.B, atol=1e-6, rtol=1e-4
        )


def test_merges_leave_the_loss_and_restart_the_optimizer(text):
    program = started(values(text, RELORA, steps=5))
    for k in range(2):
        program.comm.step = k
        if k == 1:  # the second step ends with a merge
            program.problem.restarts, kept = None, program.problem.restarts
            program.step()
            before = program.evaluate()["loss"]
            base = [
                m.base.clone()
                for m in program.problem.module.modules()
                if isinstance(m, RestartedLinear)
            ]
            program.problem.restarts = kept
            program._restart()
        else:
            program.step()
    assert program.evaluate()["loss"] == pytest.approx(before, rel=1e-12)
    for i, row in enumerate(program.state.x):
        program.layout.bind(program.problem.module, row)
        program.oracle.buffers.bind(i)
        layers = [layer for _, layer in layers_of(program.problem.module)]
        assert not any(layer.B.any() for layer in layers)
        assert all(not torch.equal(a, layer.base) for a, layer in zip(base, layers, strict=True))
    assert torch.equal(program.state.x[0], program.state.x[1])
    moments = program.state.optimizer.m
    for s in program.layout.slices:
        part = moments[:, s.begin : s.end]
        if s.name.endswith((".A", ".B")):
            assert int((part != 0).sum(1).max()) <= math.ceil(0.001 * part.shape[1])
        else:
            assert part.any()


@pytest.mark.parametrize(("reset", "kept"), [("random", None), ("magnitude", [3, 7])])
def test_a_share_of_a_parameters_state_becomes_zero(reset, kept):
    state = torch.tensor([[9.0, 9.0, 1.0, -5.0, 2.0, 0.5, -0.1, 4.0, 9.0]])
    where = Slice("layer.A", tensor=3, begin=2, shape=torch.Size([2, 3]))
    Restarts(every=5, reset=reset, share=0.7, seed=0).prune_(state, where, step=5)
    assert state[0, [0, 1, 8]].tolist() == [9.0, 9.0, 9.0]
    left = state[0, 2:8].nonzero().flatten()
    assert len(left) == 2
    if kept is not None:
        assert (left + 2).tolist() == kept


@pytest.mark.parametrize("algorithm", ["dsgd", "d-nasa"])
def test_merges_are_refused_where_ranks_differ(text, algorithm):
    optimizer = {"name": "sgd", "lr": 0.1} if algorithm == "dsgd" else None
    with pytest.raises(ConfigError, match="goes with algorithm all-reduce and oracle backprop"):
        started(values(text, RELORA, algorithm=algorithm, optimizer=optimizer))


def test_a_merged_model_exports_its_frozen_weights(text):
    program, _ = trained(values(text, RELORA, ranks=1, steps=4))
    module = program.problem.module.eval()
    program.layout.bind(module, program.state.x[0])
    tokens = torch.arange(8)[None]
    wanted = module(tokens)
    assert not any(isinstance(m, RestartedLinear) for m in to_dense(module).modules())
    torch.testing.assert_close(module(tokens), wanted)
    assert all(isinstance(m, nn.Linear) for n, m in module.named_modules() if n.endswith("_proj"))


def test_schemes_say_what_is_wrong(text):
    wrong = {
        "alpha: has no effect at rank 0": {"name": "sltrain", "rank": 0, "alpha": 4},
        "never learns; use scheme low-rank": {"name": "sltrain", "rank": 2, "density": 0.001},
        "leave out train_scale": {**SLTRAIN, "freeze_a": True, "train_scale": True},
        "freeze_a: has no effect at rank 0": {"name": "sltrain", "rank": 0, "freeze_a": True},
        "use at most 8, got 9": {"name": "low-rank", "rank": 9},
        "task.scheme.targets: no linear layer has router": {**SLTRAIN, "targets": ["router"]},
        r"task.scheme.rank: missing": {"name": "sltrain"},
        "unknown scheme 'sltrian'; did you mean 'sltrain'": {"name": "sltrian"},
    }
    for message, scheme in wrong.items():
        with pytest.raises(ConfigError, match=message):
            started(values(text, scheme))
