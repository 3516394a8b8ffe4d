"""What can be wrong with a topology: one exception class for each check, all ValueErrors."""


class TopologyError(ValueError):
    """A topology cannot be built or used as asked; the message names field, value, rule and fix."""


class TopologySizeError(TopologyError):
    """The graph's number of nodes is not the number of ranks."""


class TopologyWeightError(TopologyError):
    """A weight is not finite, negative where that is not allowed, or given for some edges only."""


class TopologyConnectivityError(TopologyError):
    """Some ranks never hear from some others, directly or through neighbors."""


class TopologyStochasticError(TopologyError):
    """Rows or columns of a mixing matrix do not sum to one, or it is not symmetric as declared."""


class TopologyPeriodicError(TopologyError):
    """The matrix has a second eigenvalue of modulus one: values circulate and never agree."""


class TopologyParameterError(TopologyError):
    """A parameter is unknown, of the wrong type, or outside what the topology allows."""
