"""What gives whole gradients, or needs them, is refused where parameters are updated one by one."""

import pytest
import torch
from torch import nn

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.optimizers.adam_bc import AdamBC
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.privacy.disk import Disk
from gossamer.algorithms.privacy.doppler import Doppler
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.privacy.public import PublicData
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.launch.attach import attach
from gossamer.launch.config import Experiment, resolve
from gossamer.runtime import ConfigError

PRIVATE = {"noise_multiplier": 1.0, "noise_seed": 1, "accountant": "rdp"}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: DP(inner=Backprop(), **PRIVATE), "dp bounds whole gradients"),
        (lambda: Doppler(inner=Backprop()), "doppler keeps whole rows"),
        (lambda: Disk(inner=Backprop()), "disk keeps whole rows"),
        (
            lambda: PublicData(inner=DP(inner=Backprop(), **PRIVATE), fraction=0.1),
            "public gives whole gradients",
        ),
        (ZerothOrder, "zeroth-order makes no gradient at all"),
        (lambda: Backprop(vectorize=True), "vectorize makes the gradients of all"),
    ],
)
def test_oracles_of_whole_gradients_are_refused(make, reason):
    algorithm = AllReduce(optimizer=SGD(lr=0.1), per_layer=True)
    with pytest.raises(ConfigError, match=rf"algorithm\.per_layer: .*{reason}.*per_layer: false"):
        algorithm.require(make())
    AllReduce(optimizer=SGD(lr=0.1)).require(make())


def test_it_is_refused_before_anything_is_built():
    values = {
        "task": {"name": "digits"},
        "oracle": ["backprop", {"name": "dp", **PRIVATE}],
        "algorithm": {"name": "all-reduce", "per_layer": True},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "steps": 1,
    }
    with pytest.raises(ConfigError, match=r"algorithm\.per_layer: .*dp bounds whole gradients"):
        Experiment(resolve(values), 2)


def test_a_bound_on_whole_gradients_is_refused():
    algorithm = AllReduce(optimizer=SGD(lr=0.1, max_norm=1.0), per_layer=True)
    with pytest.raises(ConfigError, match=r"optimizer\.max_norm: 1 bounds .* whole gradients"):
        algorithm.require(Backprop())


NOT_KNOWN = r"optimizer\.name: adam-bc .*leave algorithm\.per_layer out, or use adam"


def test_the_noise_of_gradients_in_parts_is_not_known():
    with pytest.raises(ConfigError, match=NOT_KNOWN):
        AllReduce(optimizer=AdamBC(lr=0.1), per_layer=True).require(Backprop())
    with pytest.raises(ConfigError, match=NOT_KNOWN):
        ZerothOrder().adapt(AllReduce(optimizer=AdamBC(lr=0.1)))
    AllReduce(optimizer=AdamBC(lr=0.1)).require(DP(inner=Backprop(), **PRIVATE))


def test_attach_refuses_it():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    algorithm = {"name": "all-reduce", "per_layer": True}
    with pytest.raises(ConfigError, match=r"algorithm\.per_layer: .*backward gives whole"):
        attach(model, optimizer, algorithm=algorithm, topology="complete")
