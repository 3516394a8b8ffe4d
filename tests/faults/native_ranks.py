"""Real processes that share memory, each doing what the test tells it."""

import contextlib
import multiprocessing
import os
import secrets
import signal
import threading
import time
import traceback
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["gossamer.runtime", "gossamer.topologies"])

ROW = 40_000


class Rank:
    """One process's side: the methods are what a test can ask for."""

    def __init__(self, job, process, processes, uid):
        from gossamer.runtime.shared_memory import SharedMemory

        if uid is not None:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        self.shared = SharedMemory(job, process, processes, range(processes))

    def attach(self, tickets):
        from gossamer.runtime.exchange import plan_exchange
        from gossamer.runtime.placement import Placement
        from gossamer.topologies import build

        self.shared.attach(tickets)
        n, me = self.shared.processes, self.shared.process
        if n > 1:
            plan = plan_exchange(build("complete", n).round(0), Placement(n, n), me)
            self.plan = self.shared.prepare(plan)

    def repeat(self, operation, timeout_s, times=10**9, d=ROW):
        """Run an operation again and again; return what its rows held if it failed."""
        import torch

        for k in range(times):
            x = self.shared.alloc(1, d, torch.float32).fill_(self.shared.process + k)
            out = self.shared.alloc(1, d, torch.float32)
            if operation == "average in place":
                out = x
            try:
                getattr(self, operation.split()[0])(x, out, timeout_s)
            except Exception as error:
                return type(error).__name__, str(error), x.unique().numel() == 1
            mean = k + (self.shared.processes - 1) / 2
            assert torch.allclose(out, torch.full_like(out, mean)), (operation, k)
        return "done", "", True

    def average(self, x, out, timeout_s):
        status = self.shared.average(self.plan, x, out, None, 1, timeout_s)
        self.shared.check(status, "average", timeout_s)

    def sum(self, x, out, timeout_s):
        n = self.shared.processes
        status = self.shared.sum(x, out, [1] * n, float(n), timeout_s)
        self.shared.check(status, "sum", timeout_s)

    def exchange(self, x, out, timeout_s):
        import torch

        peers = [p for p in range(self.shared.processes) if p != self.shared.process]
        received = [torch.empty_like(x) for _ in peers]
        exchange = self.shared.exchange(
            [(p, x) for p in peers], list(zip(peers, received, strict=True))
        )
        self.shared.check(exchange.wait(timeout_s), "exchange", timeout_s)
        out.copy_(torch.stack([x, *received]).mean(0))

    def once(self, operation, d, timeout_s, stops=False):
        """Run an operation on long rows; return its status. Or stop where the result appears."""
        import torch

        x = self.shared.alloc(1, d, torch.float32).fill_(self.shared.process + 1)
        out = self.shared.alloc(1, d, torch.float32)
        if operation == "average in place":
            out = x
        watched, before = out.numpy(), float(out[0, 0])

        def stop():
            while watched[0, 0] == before:
                pass
            os.kill(os.getpid(), signal.SIGSTOP)

        if stops:
            threading.Thread(target=stop, daemon=True).start()
        if operation == "sum":
            status = self.shared.sum(x, out, [1] * self.shared.processes, 1.0, timeout_s)
        else:
            status = self.shared.average(self.plan, x, out, None, 1, timeout_s)
        self.out = out
        return status

    def values(self):
        """Return what the result of ``once`` holds, and how often."""
        values, counts = self.out.unique(return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def fill(self, value):
        self.out.fill_(value)

    def fork_a_child_that_leaves(self):
        pid = os.fork()
        if pid == 0:
            self.shared.close()
            os._exit(0)
        return os.waitpid(pid, 0)[1]

    def memory(self):
        """Return its ticket, mode and owner, and what the system answers to a shorter size."""
        fd = self.shared.ticket.fd
        status = os.fstat(fd)
        try:
            os.ftruncate(fd, 4096)
            refused = ""
        except PermissionError as error:
            refused = str(error)
        return {"mode": status.st_mode & 0o7777, "uid": status.st_uid, "refused": refused}


def _serve(connection, job, process, processes, uid):
    # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rank = Rank(job, process, processes, uid)
    connection.send(tuple(rank.shared.ticket))
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("ok", getattr(rank, method)(*arguments)))
        except BaseException as error:  # KeyboardInterrupt too
            connection.send((type(error).__name__, f"{error}", traceback.format_exc()))


class Crew:
    """The processes of one job; leave the ``with`` block to end them."""

    def __init__(self, processes, uid=None):
        job = secrets.token_bytes(16)
        self.label = f"memfd:gossamer-{uid or os.getuid()}-{job[:4].hex()}"
        self.members, self.tickets = [], []
        for p in range(processes):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs, job, p, processes, uid))
            process.start()
            theirs.close()
            self.members.append((process, ours))
        self.tickets = [self.hear(p) for p in range(processes)]

    def attach(self):
        for p in range(len(self.members)):
            self.tell(p, "attach", self.tickets)
        assert [self.hear(p)[0] for p in range(len(self.members))] == ["ok"] * len(self.members)
        return self

    def tell(self, p, method, *arguments):
        self.members[p][1].send((method, arguments))

    def hear(self, p, seconds=60):
        connection = self.members[p][1]
        assert connection.poll(seconds), f"no answer of process {p} within {seconds} s"
        return connection.recv()

    def ask(self, p, method, *arguments):
        self.tell(p, method, *arguments)
        return self.hear(p)

    def signal(self, p, number):
        os.kill(self.members[p][0].pid, number)

    def until_stopped(self, p, seconds=60):
        """Wait until process p has stopped; say whether it had not answered yet."""
        stat = Path(f"/proc/{self.members[p][0].pid}/stat")
        deadline = time.monotonic() + seconds
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, f"process {p} does not stop"
            time.sleep(0.01)
        return not self.members[p][1].poll()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for _process, connection in self.members:
            connection.close()
        for process, _ in self.members:
            process.join(2)
            process.kill()
            process.join()

    def holders(self):
        """Return the processes that hold or map memory of this job."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.label in (folder / "maps").read_text():
                    found.add(int(folder.name))
            with contextlib.suppress(OSError):
                for fd in (folder / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        if self.label in str(fd.readlink()):
                            found.add(int(folder.name))
        return found

    def until_nobody_holds_its_memory(self, seconds=10):
        deadline = time.monotonic() + seconds
        while holders := self.holders():
            assert time.monotonic() < deadline, holders
            time.sleep(0.01)
