"""Weight decay, of all parameters or of those that names choose."""

from __future__ import annotations

from pydantic import Field, PrivateAttr
from torch import Tensor

from gossamer.algorithms.optimizers.base import Optimizer
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.rows import RowLayout, combine

__all__ = ["Decaying"]


class Decaying(Optimizer):
    """An optimizer with weight decay."""

    weight_decay: float = Field(default=0.0, ge=0)
    """L2 penalty added to the gradient."""
    decay_except: tuple[str, ...] = ()
    """Parameters with one of these in their names do not decay: [bias, layer_norm, layernorm] are
    those of MeZO (arXiv:2305.17333)."""

    _spans: list[tuple[int, int]] | None = PrivateAttr(default=None)

    def know(self, layout: RowLayout, alike: bool = False) -> None:
        """Find the parameters that decay.

        Raises:
            ConfigError: no name holds any of ``decay_except``.
        """
        if not self.decay_except:
            return
        names = (s.name for s in layout.slices)
        spared = {name for name in names if any(part in name for part in self.decay_except)}
        if not spared:
            raise ConfigError(
                f"optimizer.decay_except: no parameter has {' or '.join(self.decay_except)} in its "
                f"name; they are called {', '.join(s.name for s in layout.slices[:3])}, ..."
            )
        self._spans = [(s.begin, s.end) for s in layout.slices if s.name not in spared]

    def decayed(
        self, x: Tensor, grad: Tensor, scale: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """Return grad + scale * weight_decay * x, on what decays; grad itself without decay.

        Args:
            x: (local, m), the columns that are updated now.
            grad: like ``x``.
            scale: of the decay.
            out: where to write, ``grad`` maybe; None: a new tensor.
        """
        decay = scale * self.weight_decay
        if not decay:
            return grad
        if self._spans is None:
            return combine([(1.0, grad), (decay, x)], out=out)
        result = grad.clone() if out is None else out.copy_(grad)
        first, last = self._columns.start, self._columns.start + x.shape[1]
        for begin, end in self._spans:
            part = slice(max(begin, first) - first, min(end, last) - first)
            if part.start < part.stop:
                terms = [(1.0, result[:, part]), (decay, x[:, part])]
                combine(terms, out=result[:, part])
        return result
