"""How long outputs are in a plan: log-normal, given by their median and 99th percentile and cut at the longest allowed one."""

from math import exp, inf, log
from statistics import NormalDist
from typing import NamedTuple

from configs.planning import Workload

_NORMAL = NormalDist()
_Z99 = _NORMAL.inv_cdf(0.99)


class Lengths(NamedTuple):
    """Output tokens a trace. live: tokens of output that a slot in use holds on average over time. A trace of length L
    holds its slot for L steps with L / 2 tokens on average, so long ones weigh more: E[L^2] / 2 E[L], not E[L] / 2."""

    mean: float
    live: float

    @property
    def square(self) -> float:
        """E[L^2]."""
        return 2 * self.live * self.mean


def output_lengths(workload: Workload, max_tokens: int) -> Lengths:
    """Of min(L, max_tokens) for log-normal L."""
    mu = log(workload.output_tokens_median)
    sigma = (log(workload.output_tokens_p99) - mu) / _Z99
    mean, square = (_moment(power, mu, sigma, max_tokens) for power in (1, 2))
    return Lengths(mean, square / mean / 2)


def _moment(power: int, mu: float, sigma: float, cut: float) -> float:
    """E[min(L, cut)^power] = e^(p mu + p^2 sigma^2 / 2) F(z - p sigma) + cut^p (1 - F(z)), with z the cut in sigmas."""
    if cut == inf:
        return exp(power * mu + (power * sigma) ** 2 / 2)
    z = (log(cut) - mu) / sigma
    below = exp(power * mu + (power * sigma) ** 2 / 2) * _NORMAL.cdf(z - power * sigma)
    return below + cut**power * (1 - _NORMAL.cdf(z))
