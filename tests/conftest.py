"""Fixtures and rules for every test."""

import os
from pathlib import Path

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep jobs of many processes apart under ``pytest -n``.

    One worker runs all of MANY_PROCESSES, one test at a time: two such jobs at once would only take
    each other's cores. The claims share a laboratory, so one worker has them. Both begin at once;
    any worker that is free takes the other tests, one by one.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            folder = Path(nodeid.partition("::")[0]).parent.name
            if folder == "claims":
                return folder
            return "many processes" if folder in MANY_PROCESSES else nodeid

    return ByFolder(config, log)


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU, or MPI ranks, where there are none, and what was not asked for."""
    import torch

    ranks = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    for item in items:
        if item.get_closest_marker("long") and not os.environ.get("GOSSAMER_LONG_TESTS"):
            item.add_marker(pytest.mark.skip(reason="takes GOSSAMER_LONG_TESTS=1"))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("mpi") and ranks == 1:
            item.add_marker(pytest.mark.skip(reason="runs under mpirun (test_mpi_suite.py)"))
