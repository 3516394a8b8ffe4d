"""What ranks must start from alike: what counts, and who is named."""

import pytest
import torch
from thread_ranks import on_processes
from torch import nn

from gossamer.algorithms.common_start import digests_of, fixed_tensors, require_common
from gossamer.runtime import Communicator, RanksDiffer, RowLayout
from gossamer.topologies import build


class Sparse(nn.Module):
    """Values that are trained, at places that are neither a parameter nor a buffer."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(3))
        self.places = torch.tensor([1, 4, 6], dtype=torch.int32)

    def fixed_tensors(self):
        return {"places": self.places}


def model():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Sparse())
    module[0].bias.requires_grad_(False)
    return module


def test_fixed_are_frozen_parameters_integer_buffers_and_what_modules_list():
    module = model()
    found = fixed_tensors(module, RowLayout(module))
    assert set(found) == {"0.bias", "1.num_batches_tracked", "2.places"}
    assert found["2.places"] is module[2].places
    assert set(fixed_tensors(module[2], RowLayout(module[2]))) == {"places"}
    assert fixed_tensors(nn.Linear(2, 2), RowLayout(nn.Linear(2, 2))) == {}


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([1, 4, 7], dtype=torch.int32),
        torch.tensor([1, 4, 6]),
        torch.tensor([[1, 4, 6]], dtype=torch.int32),
        torch.tensor([1, 4], dtype=torch.int32),
    ],
)
def test_a_digest_is_of_values_dtype_and_shape(other):
    places = torch.tensor([1, 4, 6], dtype=torch.int32)
    assert digests_of({"a": places}) == digests_of({"a": places.clone()})
    assert digests_of({"a": places}) != digests_of({"a": other})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_any_dtype_and_size_has_a_digest(dtype):
    tensors = {"number": torch.ones((), dtype=dtype), "none": torch.ones(0, 3, dtype=dtype)}
    tensors["turned"] = torch.ones(2, 3, dtype=dtype).T
    assert len(set(digests_of(tensors).values())) == 3


def compare(tensors_of, ranks=6, processes=3):
    """Return per process what is raised, or None."""

    def process(transport):
        comm = Communicator(build("complete", ranks), transport, timeout_s=20)
        try:
            require_common(comm, digests_of(tensors_of(transport.process)))
        except RanksDiffer as error:
            return str(error)
        assert not comm.traffic.bytes_sent.any()
        return None

    return on_processes(processes, process)[0]


def test_equal_tensors_pass():
    assert compare(lambda process: {"a": torch.ones(3), "b": torch.zeros(2)}) == [None] * 3
    assert compare(lambda process: {}) == [None] * 3


def test_all_processes_name_the_ranks_and_the_first_tensor_that_differs():
    def tensors(process):
        apart = float(process == 1)
        return {"a": torch.ones(3), "b": torch.full((2,), apart), "c": torch.full((2,), apart)}

    for error in compare(tensors):
        assert r"ranks [2, 3] hold another 'b' than rank 0" in error
        assert "same seed and checkpoint" in error


def test_a_module_of_more_tensors_is_named_too():
    def tensors(process):
        return {"a": torch.ones(3)} | ({"b": torch.ones(1)} if process == 2 else {})

    found = compare(tensors)
    assert "ranks [4, 5] hold more tensors, or fewer, than rank 0" in found[0]
    assert "ranks [4, 5] hold another 'b' than rank 0" in found[2]
