"""What a zeroth-order estimate descends on: losses, scores, anything that can be computed."""

import pytest
import torch
from zeroth_order_problems import (
    N,
    advance,
    estimate_at,
    full,
    network,
    program,
)

from gossamer.algorithms.tasks.objectives import count_right
from gossamer.runtime import ConfigError


def always_seven(module, inputs):
    return 7


@pytest.mark.parametrize("minimize", ["accuracy", "f1", f"{__name__}:always_seven"])
def test_anything_that_can_be_computed_can_be_minimised(minimize, caplog):
    run = program(network(), full(minimize=minimize, eps=0.5))
    found, batch = estimate_at(run)
    if minimize == "accuracy":
        loss = run.oracle.loss(run.state.x, batch)
        score = count_right(run.problem.module, batch[0].inputs)["accuracy"]
        assert float(loss) == pytest.approx(-float(score) / N)
    if minimize == "f1":
        run.oracle._calls = (-1, 0)
        assert -1 <= found.loss.item() < 0
    if ":" in minimize:
        assert found.loss.item() == 7
        assert found.grad.coefficients.item() == 0


def test_f1_is_that_of_scikit_learn():
    from sklearn.metrics import f1_score

    from gossamer.algorithms.zeroth_order.objectives import negative_f1

    problem = network()
    inputs = problem.examples(N)
    with torch.no_grad():
        found = problem.module.eval()(inputs[0]).argmax(1)
        expected = f1_score(inputs[1], found, average="macro")
        assert float(negative_f1(problem.module, inputs)) == pytest.approx(-expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minimize": "recall"}, r"oracle\.minimize: the task has no score 'recall'"),
        ({"minimize": "nowhere:f"}, r"oracle\.minimize: there is no module 'nowhere'"),
        ({"minimize": "f1", "estimate": "forward"}, r"oracle\.estimate: forward takes a deriv"),
        ({"pool": 3, "sparsity": 0.5}, r"oracle\.sparsity: a pool's directions"),
        ({"estimate": "forward", "micro_batch_size": 2}, r"oracle\.micro_batch_size: estimate: f"),
        ({"minimize": "f1", "micro_batch_size": 2}, r"oracle\.micro_batch_size: a score of parts"),
    ],
)
def test_what_cannot_be_minimised_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        program(network(), full(**options))


def test_equal_losses_are_warned_of_once(caplog):
    run = program(network(), full(eps=1e-12))
    advance(run, 3)
    assert sum("oracle.eps" in record.message for record in caplog.records) == 1
