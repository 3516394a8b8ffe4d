"""The text of a user's own algorithm that fails at a given rank and step."""

MODULE = '''
import os
import signal
import time
from typing import Any, Literal

from pydantic import Field

from gossamer.algorithms.decentralized.dsgd import DSGDState
from gossamer.algorithms.protocols import (Algorithm, Optimizer)


class Faulty(Algorithm):
    """Decentralized SGD that fails during the round of one step."""

    fault: Literal["none", "raise", "sleep", "stop", "kill", "slow"] = "none"
    rank: int = 0
    at: int = 3
    optimizer: Optimizer = Field(exclude=True)

    def init(self, comm, oracle, x, batches) -> Any:
        return DSGDState(x=x, optimizer=self.optimizer.init(x))

    def step(self, comm, oracle, state, batches):
        x = state.x
        mixing = comm.neighbor_average_async(x)
        if comm.step == self.at and self.rank in comm.ranks:
            self.fail()
        estimate = oracle(x, batches[0])
        direction = self.optimizer.direction(
            state.optimizer, x, estimate.grad, comm, estimate.origin
        )
        x.copy_(mixing.wait() - self.optimizer.rate(comm) * direction)
        comm.neighbor_average(x, out=x)
        if self.fault == "slow":
            time.sleep(0.02)
        return {"loss": estimate.loss}

    def fail(self):
        if self.fault == "raise":
            raise ArithmeticError("the gradient of rank 1 is a lemon")
        if self.fault == "sleep":
            while True:
                time.sleep(3600)
        if self.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
'''
