"""Fixtures and rules for every test."""

import os

import pytest

# Ranks outnumber cores in these tests, containers run as root, and Open MPI's one-sided component
# complains at exit.
MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_osc": "^ucx",
    "OMP_NUM_THREADS": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}

MANY_PROCESSES = ("csrc", "distributed", "faults")


@pytest.fixture
def launch_environment() -> dict[str, str]:
    """The environment for mpirun and torchrun children: nothing of this process's own launcher."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        ours.pop(name, None)
    return ours | MPI_ENVIRONMENT


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """Skip what needs a GPU, or MPI ranks, where there are none; keep jobs of many processes apart.

    Under ``pytest -n`` one worker runs all of MANY_PROCESSES, one test at a time: two such jobs at
    once would only take each other's cores. The claims share a laboratory, so one worker has them.
    """
    import torch

    ranks = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    for item in items:
        folder = item.path.parent.name
        if folder == "claims" or folder in MANY_PROCESSES:
            group = "claims" if folder == "claims" else "many processes"
            item.add_marker(pytest.mark.xdist_group(group))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("mpi") and ranks == 1:
            item.add_marker(pytest.mark.skip(reason="runs under mpirun (test_mpi_suite.py)"))
