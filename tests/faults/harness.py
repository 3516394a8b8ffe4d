"""Starts real `gossamer` processes, watches them, and finds what they left behind."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

MARKER = "GOSSAMER_TEST_MARKER"

DIGITS = {
    "task": {"name": "wine", "model": "linear"},
    "oracle": {"name": "backprop", "batch_size": 8},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "algorithm": {"name": "dsgd"},
    "topology": {"name": "ring"},
    "ranks": 4,
    "steps": 20,
    "log_every": 1,
}
"""A run of a tenth of a second."""


def until(condition, seconds, what):
    """Poll ``condition`` until it is true; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            what = what() if callable(what) else what
            raise AssertionError(f"not within {seconds:.1f} s: {what}")
        time.sleep(0.005)
    return value


def alive(marker):
    """Return the pids of the processes, other than zombies, with ``marker`` in the environment."""
    found, text = [], f"{MARKER}={marker}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text in (folder / "environ").read_bytes().split(b"\0"):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX":
                    found.append(int(folder.name))
    return found


def descendants(pid):
    """Return the pids below ``pid``, whatever their environment."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parts = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(parts[1])
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def environment(**extra):
    """Return this environment without a launcher's variables, with ``extra``."""
    launcher = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "TORCHELASTIC_", "GOSSAMER_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    ours = {k: v for k, v in os.environ.items() if not k.startswith(launcher) and k not in names}
    if data := os.environ.get("GOSSAMER_DATA"):
        ours["GOSSAMER_DATA"] = data
    ours |= {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_osc": "^ucx",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMP_NUM_THREADS": "1",
    }
    return ours | {k: str(v) for k, v in extra.items()}


def write_yaml(path, **changes):
    """Write the small run with ``changes`` (None drops a section) as YAML; JSON is YAML."""
    values = {k: v for k, v in (DIGITS | changes).items() if v is not None}
    path.write_text(json.dumps(values))
    return path


@dataclass
class Child:
    """A process that the zygote forked."""

    zygote: "Zygote"
    pid: int
    stdout_path: Path
    stderr_path: Path
    started: float
    status: int | None = None
    ended: float | None = None

    def wait(self, seconds=60):
        """Return the exit status (negative: that signal)."""
        until(lambda: self.poll() is not None, seconds, f"the end of {self.pid}: {self.stderr}")
        return self.status

    def poll(self):
        self.zygote.collect()
        if self.status is None and self.pid in self.zygote.ended:
            self.status, self.ended = self.zygote.ended.pop(self.pid)
        return self.status

    def kill(self, number=signal.SIGKILL):
        if self.status is None:
            os.kill(self.pid, number)

    @property
    def stdout(self):
        return self.stdout_path.read_text() if self.stdout_path.exists() else ""

    @property
    def stderr(self):
        return self.stderr_path.read_text() if self.stderr_path.exists() else ""


@dataclass
class Zygote:
    """Forks `gossamer` command lines from a process that has imported torch."""

    process: subprocess.Popen = field(
        default_factory=lambda: subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        )
    )
    children: list = field(default_factory=list)
    ended: dict = field(default_factory=dict)
    buffered: bytes = b""
    answers: list = field(default_factory=list)

    def start(self, folder, argv, *, limit_bytes=None, **env):
        """Start `gossamer argv` in ``folder``."""
        name = uuid.uuid4().hex[:8]
        streams = folder / f".{name}.out", folder / f".{name}.err"
        request = {
            "argv": [str(a) for a in argv],
            "env": environment(**env),
            "cwd": str(folder),
            "stdout": str(streams[0]),
            "stderr": str(streams[1]),
            "limit_bytes": limit_bytes,
        }
        started = time.monotonic()
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        pid = until(self._started, 120, "the zygote's answer")
        child = Child(self, pid, *streams, started)
        self.children.append(child)
        return child

    def run(self, folder, argv, seconds=120, **options):
        """Start `gossamer argv` and return the ended process."""
        child = self.start(folder, argv, **options)
        child.wait(seconds)
        return child

    def start_ranks(self, folder, argv, count, **env):
        """Start ``count`` processes of one gloo run, as a launcher would."""
        store = folder / f".{uuid.uuid4().hex[:8]}.store"
        return [
            self.start(
                folder,
                argv,
                RANK=p,
                LOCAL_RANK=p,
                WORLD_SIZE=count,
                LOCAL_WORLD_SIZE=count,
                GOSSAMER_RENDEZVOUS=f"file://{store}",
                **env,
            )
            for p in range(count)
        ]

    def collect(self):
        """Read the answers that have come."""
        while select.select([self.process.stdout], [], [], 0)[0]:
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            assert chunk, "the zygote ended"
            *lines, self.buffered = (self.buffered + chunk).split(b"\n")
            for line in map(json.loads, lines):
                if "status" in line:
                    self.ended[line["pid"]] = line["status"], time.monotonic()
                elif "pid" in line:
                    self.answers.append(line["pid"])

    def _started(self):
        self.collect()
        return self.answers.pop(0) if self.answers else None

    def close(self):
        """End it and whatever it still has."""
        for child in self.children:
            child.poll()
            child.kill()
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()
