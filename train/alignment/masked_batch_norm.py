"""BatchNorm over those rows of a batch that count, with running statistics of one kind or of each domain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echoshift.train.cached.batches import Domain

_EPS, _MOMENTUM = 1e-5, 0.1


class MaskedBatchNorm(nn.Module):
    """Normalises [B, D] by the mean and variance of the rows that count; eps and momentum are torch's.

    nn.BatchNorm1d would count silent segments' rows. In training a batch is normalised by its own statistics, and the
    running ones of its domain move towards them, in place, so that the buffers which torch.func's functional_call puts
    in their place move too, under vmap as well; a batch in which nothing counts moves nothing. In eval mode the running
    ones of the domain normalise.

    Attributes:
        running_mean, running_var: float32 [n_domains, D]: of all batches, or, `per_domain`, of source and target.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, *, per_domain: bool) -> None:
        super().__init__()
        n_domains = 2 if per_domain else 1
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(n_domains, width))
        self.register_buffer("running_var", torch.ones(n_domains, width))

    def forward(self, values: Tensor, counted: Tensor, domain: Domain) -> Tensor:
        """Normalise float [B, D] of a domain; `counted` bool [B]. Rows that don't count are normalised as well."""
        values = values.float()
        kept = 1 if domain == "target" and len(self.running_mean) > 1 else 0
        if self.training:
            mean, var = self._measure(values, counted, kept)
        else:
            mean, var = self.running_mean[kept], self.running_var[kept]
        return (values - mean) * torch.rsqrt(var + _EPS) * self.weight + self.bias

    def _measure(self, values: Tensor, counted: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Measure a batch, and moves the running statistics; as torch's, those are of the unbiased variance."""
        weights = counted.float()[:, None]
        n = weights.sum()
        mean = (values * weights).sum(dim=0) / n.clamp(min=1)
        var = ((values - mean).square() * weights).sum(dim=0) / n.clamp(min=1)
        share = _MOMENTUM * (n > 0).float()
        unbiased = var.detach() * (n / (n - 1).clamp(min=1))
        running_mean, running_var = self.running_mean[kept], self.running_var[kept]
        running_mean.copy_(running_mean + share * (mean.detach() - running_mean))
        running_var.copy_(running_var + share * (unbiased - running_var))
        return mean, var
