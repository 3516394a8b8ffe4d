"""Separate hosts on one machine: network namespaces on a switch, each link limited in rate."""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

_PREFIX = "gossamer-test"
_MASTER_PORT = "29500"  # the namespaces share it with nobody
_DEVICE = "eth0"


# $1: the host; the rest: what to run there. To mpirun a host is its name.
_AGENT = """#!/bin/sh
host=$1; shift
exec ip netns exec "$host" unshare --uts --mount sh -c \\
  "mount --bind '{names}' /etc/hosts && hostname '$host' && $*"
"""


def _ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def names():
    return re.findall(rf"^{_PREFIX}-\d+-\w+", _ip("netns", "list"), re.MULTILINE)


def sweep():
    """Delete the namespaces of test processes that are gone."""
    for name in names():
        if not Path(f"/proc/{name.split('-')[2]}").exists():
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)


def why_not():
    """Return why hosts cannot be made here, or nothing."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"needs iproute2: {missing} not found"
    try:
        with Hosts(2, "200mbit"):
            return ""
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted here: {error.stderr.strip()}"


class Hosts:
    """``count`` hosts 10.9.0.1.. and a switch; gone when the ``with`` block ends.

    Names carry the pid of the test process, so that parallel ones do not meet and leftovers show.
    """

    _numbers = itertools.count()

    def __init__(self, count, rate):
        prefix = f"{_PREFIX}-{os.getpid()}-{next(self._numbers)}"
        self.names = [f"{prefix}h{k}" for k in range(count)]
        self.rate = rate
        self.switch = f"{prefix}switch"

    def __enter__(self):
        sweep()
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self):
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "switch", "up")
        for k, name in enumerate(self.names):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            peer = ["peer", "name", f"port{k}", "netns", self.switch]
            _ip("link", "add", _DEVICE, "netns", name, "type", "veth", *peer)
            _ip("-n", self.switch, "link", "set", f"port{k}", "master", "switch", "up")
            _ip("-n", name, "addr", "add", f"10.9.0.{k + 1}/24", "dev", _DEVICE)
            _ip("-n", name, "link", "set", _DEVICE, "up")
            limit = ["tbf", "rate", self.rate, "burst", "64kbit", "latency", "400ms"]
            command = ["tc", "-n", name, "qdisc", "add", "dev", _DEVICE, "root", *limit]
            subprocess.run(command, check=True, capture_output=True, text=True)

    def __exit__(self, *_):
        for name in [n for n in (*self.names, self.switch) if n in names()]:
            pids = _ip("netns", "pids", name).split()
            for pid in pids:  # only what was started in it
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", name)

    def start(self, processes, arguments, environment):
        """Start ``python *arguments`` in the namespaces, ``processes[k]`` times in the k-th."""
        hosts = [k for k, count in enumerate(processes) for _ in range(count)]
        started = []
        for rank, host in enumerate(hosts):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(hosts)),
                "MASTER_ADDR": "10.9.0.1",
                "MASTER_PORT": _MASTER_PORT,
                "GLOO_SOCKET_IFNAME": _DEVICE,
                "CUDA_VISIBLE_DEVICES": "",  # else auto is nccl
                "OMP_NUM_THREADS": "1",
            }
            command = ["ip", "netns", "exec", self.names[host], sys.executable, *arguments]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(command, env=environment | variables, **streams))
        return started

    def run(self, processes, arguments, environment, timeout_s=200):
        """Run to the end; return the outputs by process, after checking that all went well."""
        started = self.start(processes, arguments, environment)
        outputs = [process.communicate(timeout=timeout_s)[0] for process in started]
        statuses = [process.returncode for process in started]
        assert not any(statuses), f"{statuses}\n" + "\n".join(o[-3000:] for o in outputs)
        return outputs

    def mpirun(self, slots, arguments, environment, folder, timeout_s=200):
        """Run ``python *arguments`` under mpirun, ``slots`` times on each host; return its output.

        Its daemons are started by a script in the place of ssh. Each host goes by its namespace's
        name, in a UTS and a mount namespace of its own.
        """
        agent, hostfile, names = (folder / name for name in ("agent", "hostfile", "hosts"))
        agent.write_text(_AGENT.format(names=names))
        agent.chmod(0o700)
        hostfile.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        addresses = [f"10.9.0.{k + 1} {name}\n" for k, name in enumerate(self.names)]
        names.write_text("".join(["127.0.0.1 localhost\n", *addresses]))
        mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
        command = [mpirun, "--prtemca", "plm_ssh_agent", str(agent), "--hostfile", str(hostfile)]
        command += ["--map-by", "slot:oversubscribe", "-n", str(slots * len(self.names))]
        command += [sys.executable, "-m", "mpi4py", *arguments]
        done = subprocess.run(
            [str(agent), self.names[0], shlex.join(command)],
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout
