"""A loop of one's own with a privacy block, on four processes of torchrun or mpirun."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("opacus")

WORKER = """
import sys, torch, gossamer
from torch import nn
from gossamer.algorithms.privacy.noise import SecretNoise
from gossamer.runtime import Communicator, ConfigError, StackedTransport, combine
from gossamer.topologies import build

comm = gossamer.init(topology="ring", transport=sys.argv[1], timeout_s=60)
assert comm.transport.name == sys.argv[2], comm.transport.name
rank, n, clip, size = comm.ranks[0], comm.n, 0.5, 8
block = {"examples": 80, "sample_rate": 0.1, "sampler": "poisson", "clip_norm": clip}
gossip = {"name": "dsgd", "order": "cta"}  # W x - g: after the first step a rank shows its own g


def attached(algorithm, noise, **more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 5000, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    privacy = {**block, "noise_multiplier": noise, **more}
    return model, gossamer.attach(model, optimizer, algorithm, comm=comm, privacy=privacy)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def step(model, optimizer):
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(size, 6, generator=generator), torch.arange(size) % 5
    before = flat(model)
    nn.functional.cross_entropy(model(x)[:, :5], y).backward()
    clipped, each = 0.0, [p.grad_sample.flatten(1) for p in model.parameters()]
    for g in torch.cat(each, 1):
        clipped = clipped + g * min(1.0, clip / (float(g.norm()) + 1e-6))
    optimizer.step()
    return flat(model) - before, clipped / size


for algorithm in ("all-reduce", gossip):
    move, own = step(*attached(algorithm, 0.0))
    central = algorithm == "all-reduce"
    expected = comm.all_reduce(own[None], "mean")[0] if central else own
    torch.testing.assert_close(-move, expected, rtol=1e-4, atol=1e-6)

    model, optimizer = attached(algorithm, 2.0)
    noise = (step(model, optimizer)[0] + expected) * size
    rows = comm.all_gather(noise[None].contiguous())
    said = optimizer.gossamer.statement()
    if central:  # all have the mean of four sums, whose noise together is sigma C
        assert torch.equal(rows, rows[:1].expand_as(rows))
        assert abs(float(rows[0].std()) * n - 2 * clip) < 0.05 * clip
        assert (said["noise_mode"], said["examples"]) == ("split", 320)
    else:  # each has added all of it, of its own
        assert (rows.std(1) - 2 * clip).abs().max() < 0.1 * clip
        assert (torch.corrcoef(rows) - torch.eye(n)).abs().max() < 0.05
        assert (said["noise_mode"], said["examples"]) == ("local", 80)

# Of a batch without examples only noise is left: that of the same seed and ranks in one process.
model, optimizer = attached("all-reduce", 2.0, noise_seed=3)
with torch.no_grad():
    for p in model.parameters():
        p.zero_()
optimizer.step()
together = Communicator(build("ring", n), StackedTransport())
layout = optimizer.gossamer.parts[0].layout
source = SecretNoise("split", together, 3)
rows = together.alloc(layout.d, torch.float32)
source.add_(rows, layout, 0, source.scales(2.0 * clip))
mean = together.all_reduce(combine([(1 / size, rows)]), "mean")[0]
assert torch.equal(flat(model), -layout.values(mean))

for algorithm, noise, more, words in (
    (gossip, 2.0, {"noise_mode": "split"}, "use local"),
    ("all-reduce", 1.0 + rank, {}, "noise_multiplier differs between ranks"),
):
    try:
        attached(algorithm, noise, **more)
    except ConfigError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"accepted: {words}")
comm.close()
print("good", rank)
"""


def torchrun() -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    return [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]


def mpirun() -> list[str]:
    program = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
    return [program, "-n", "4", sys.executable]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "asked", "transport"),
    [
        (torchrun, "auto", "native"),
        pytest.param(mpirun, "auto", "native", marks=pytest.mark.long),
        (mpirun, "mpi", "mpi"),
    ],
)
def test_sums_and_noise_of_four_ranks_are_those_of_the_mode(
    launcher, asked, transport, launch_environment, tmp_path
):
    (tmp_path / "worker.py").write_text(WORKER)
    done = subprocess.run(
        [*launcher(), "worker.py", asked, transport],
        cwd=tmp_path,
        env=launch_environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("good") == 4
