"""Probes of frozen representations, against scikit-learn's and a loop in plain torch."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from thread_ranks import on_processes

from gossamer.algorithms.contrastive.probes import KNN, Linear, Represented
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.random import Random
from gossamer.runtime.transports.stacked import StackedTransport


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    features, labels = torch.from_numpy(data.data / 16), torch.from_numpy(data.target)
    return Represented(features[:1000], labels[:1000]), Represented(features[1000:], labels[1000:])


def group(n=1):
    return RankGroup(n, StackedTransport())


def test_neighbours_vote_as_those_of_scikit_learn(digits):
    train, test = digits
    found = KNN(k=(1, 3, 10)).figures(group(4), train, test, Random(0))
    for k in (1, 3, 10):
        known = KNeighborsClassifier(k).fit(train.features_NF, train.labels_N)
        expected = known.score(test.features_NF, test.labels_N)
        assert found[f"knn{k}_accuracy"] == pytest.approx(expected, abs=1e-12)


def test_a_tie_goes_to_the_lowest_class_and_all_vote_where_there_are_fewer_than_k():
    train = Represented(torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([2, 1, 2, 1]))
    test = Represented(torch.tensor([[0.4], [5.4]]), torch.tensor([1, 1]))
    found = KNN(k=(1, 2, 9)).figures(group(), train, test, Random(0))
    assert found == {"knn1_accuracy": 0.0, "knn2_accuracy": 1.0, "knn9_accuracy": 1.0}


def test_the_linear_probe_is_sgd_with_momentum_on_the_counted_orders(digits):
    train, _ = digits
    probe = Linear(lr=0.1, batch_size=300, epochs=3)
    weight, bias = probe.fit(train, Random(5))
    layer = torch.nn.Linear(64, 10)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        order = Random(5).stream("contrastive/probe", step=epoch).permutation(1000)[0]
        for batch in order.split(300):
            optimizer.zero_grad()
            scores = layer(train.features_NF.float()[batch])
            torch.nn.functional.cross_entropy(scores, train.labels_N[batch]).backward()
            optimizer.step()
    torch.testing.assert_close(weight, layer.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, layer.bias, rtol=1e-5, atol=1e-6)


def test_a_linear_probe_trained_long_is_the_logistic_regression(digits):
    train, test = digits
    found = Linear(lr=0.1, epochs=300).figures(group(), train, test, Random(0))
    known = LogisticRegression(C=np.inf, max_iter=300).fit(train.features_NF, train.labels_N)
    expected = known.score(test.features_NF, test.labels_N)
    assert found["probe_accuracy"] == pytest.approx(expected, abs=0.03)


def test_the_papers_probe_is_the_default():
    probe = Linear()
    assert (probe.lr, probe.momentum, probe.batch_size, probe.epochs) == (1e-3, 0.9, 1024, 100)
    assert KNN().k == (1, 10)


@pytest.mark.parametrize("probe", [KNN(), Linear(lr=0.1, epochs=2)])
def test_all_processes_have_the_same_figures(digits, probe):
    train, test = digits
    expected = probe.figures(group(4), train, test, Random(0))

    def work(transport):
        return probe.figures(RankGroup(4, transport), train, test, Random(0))

    for processes in (2, 3):
        assert on_processes(processes, work)[0] == [expected] * processes
