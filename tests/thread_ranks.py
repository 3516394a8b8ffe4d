"""Threads as processes: queues between them, and real shared memory inside hosts where asked."""

import os
import queue
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from gossamer.runtime.errors import CommTimeout
from gossamer.runtime.shared_memory import SharedMemory
from gossamer.runtime.transports.hybrid import HybridTransport
from gossamer.runtime.transports.native import NativeTransport


class _Received:
    def __init__(self, queues, receives, operation):
        self.queues, self.receives, self.operation = queues, receives, operation

    def wait(self, timeout_s):
        for queued, (peer, tensor) in zip(self.queues, self.receives, strict=True):
            try:
                tensor.copy_(queued.get(timeout=timeout_s).view_as(tensor))
            except queue.Empty:
                raise CommTimeout(f"{self.operation}: no answer from process {peer}") from None


class Wire:
    """What lies between processes: a queue per pair, and how many bytes went through it."""

    def __init__(self, processes):
        pairs = [(a, b) for a in range(processes) for b in range(processes)]
        self.queues = {pair: queue.Queue() for pair in pairs}
        self.bytes = dict.fromkeys(pairs, 0)


class WireTransport:
    """One thread's end of the wire."""

    name, shared = "wire", None
    device = torch.device("cpu")

    def __init__(self, wire, process, processes):
        self.wire, self.process, self.processes = wire, process, processes

    def exchange(self, sends, receives, operation):
        for peer, tensor in sends:
            self.wire.queues[self.process, peer].put(tensor.clone())
            self.wire.bytes[self.process, peer] += tensor.nbytes
        queues = [self.wire.queues[peer, self.process] for peer, _ in receives]
        return _Received(queues, receives, operation)

    def close(self):
        pass

    def abort(self, status):
        raise AssertionError(status)


def on_processes(processes, work):
    """Run ``work(transport)`` on a thread per process; return (results, wire)."""
    wire = Wire(processes)
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(work, WireTransport(wire, p, processes)) for p in range(processes)]
        return [future.result(timeout=60) for future in futures], wire


def on_hosts(hosts, work):
    """Run ``work(transport)`` as every process of ``hosts``; return (results, wire)."""
    processes = sum(map(len, hosts))
    jobs = {host[0]: secrets.token_bytes(16) for host in hosts}
    tickets, attached = {}, threading.Barrier(processes)

    def process(transport):
        me = transport.process
        host = next(host for host in hosts if me in host)
        shared = SharedMemory(jobs[host[0]], host.index(me), len(host), host)
        tickets[me] = shared.ticket
        attached.wait(30)
        shared.attach([tickets[p] for p in host])
        hybrid = HybridTransport(transport, NativeTransport(shared, os._exit), hosts)
        try:
            result = work(hybrid)
            attached.wait(30)  # nobody leaves before all are done
            return result
        finally:
            hybrid.close()

    return on_processes(processes, process)
