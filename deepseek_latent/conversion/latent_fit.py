"""The latent from which the keys and values of a layer are predicted at the least cost.

Letters: d model width, x [d+1] the input of a layer with a 1 appended, m outputs of a function of x, k channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# relative to the mean square of the inputs, added to their variances: what the text does not show counts a little
RIDGE = 1e-7
FLOAT32_RIDGE = 1e-4  # the same where products are in float32
# relative to the largest singular value: functions below it are noise
NEGLIGIBLE = 1e-9
LEAST_COST = 1e-6  # of an error in a channel, relative to the largest
STEPS = 25  # of L-BFGS; the cost of a layer of SmolLM2 fell by 41 % in 15, and by 47 % in 60


class Target(NamedTuple):
    """Linear functions of x that a latent has to predict, in float64, and the cost of an error in them."""

    functions: Tensor  # [m d+1]
    root: Tensor  # [m m] square root of the cost, a quadratic form
    mean: Tensor  # [d+1] of x over the tokens that matter
    covariance: Tensor  # [d+1 d+1] of x over the same tokens, with the ridge


def make_target(functions: Tensor, form: Tensor, moments: Tensor) -> Target:
    """`functions` [m d+1] with the cost `form` [m m]; the second `moments` [d+1 d+1] of x may have any scale."""
    values, directions = torch.linalg.eigh(form)
    root = values.clamp(min=0).sqrt()[:, None] * directions.T
    # if no error costs anything, all directions count alike
    moments = moments / moments[-1, -1] if moments[-1, -1] > 0 else torch.eye(len(moments)).double()
    covariance = moments - moments[:, -1:] * moments[-1]
    covariance[:-1, :-1].diagonal().add_(RIDGE * moments[:-1, :-1].diagonal().mean())
    return Target(functions, root, moments[-1], covariance)


def fit_latent(targets: list[Target], k: int) -> Tensor:
    """A latent [k' d+1], k' <= k, as a function of x, whose channels are uncorrelated and have a mean square of 1.

    If k channels are enough, the latent determines all functions. Otherwise it minimizes the cost of predicting them:
    first as principal components over all tokens alike, then by L-BFGS, since each target counts tokens differently.
    """
    covariance = _mean_covariance(targets)
    _, sizes, rows = torch.linalg.svd(torch.cat([target.functions for target in targets])[:, :-1], full_matrices=False)
    rows = rows[sizes > NEGLIGIBLE * sizes[0].clamp(min=torch.finfo(sizes.dtype).tiny)]
    if len(rows) > k:
        weighted = torch.cat([target.root @ target.functions for target in targets])
        directions = torch.linalg.eigh(weighted @ covariance @ weighted.T)[1].flip(1)
        rows = _minimize_cost(targets, _uncorrelated(directions[:, :k].T @ weighted, covariance))
    else:
        rows = torch.nn.functional.pad(rows, (0, 1))
    latent = _uncorrelated(rows, covariance)
    mean = sum(target.mean for target in targets) / len(targets)
    latent[:, -1] = -latent[:, :-1] @ mean[:-1]
    return latent


def equal_costs(targets: list[Target], latent: Tensor) -> Tensor:
    """The same latent [k d+1] in a basis in which errors of all channels cost the same, with a mean square of 1."""
    slopes = torch.cat([target.root @ predict(target, latent)[:, :-1] for target in targets])
    costs, directions = torch.linalg.eigh(slopes.T @ slopes)
    if not len(costs) or costs[-1] <= 0:
        return latent
    latent = directions * costs.clamp(min=LEAST_COST * costs[-1]).sqrt() @ directions.T @ latent
    covariance = _mean_covariance(targets)
    return latent / ((latent @ covariance) * latent).sum(dim=1).mean().sqrt()


def predict(target: Target, latent: Tensor) -> Tensor:
    """[m k+1]: the best prediction of the functions from a latent [k d+1] and a constant 1, its last column."""
    seen = latent @ target.covariance
    slopes = torch.linalg.solve(seen @ latent.T, seen @ target.functions.T).T
    return torch.cat((slopes, ((target.functions - slopes @ latent) @ target.mean)[:, None]), dim=1)


def _minimize_cost(targets: list[Target], latent: Tensor) -> Tensor:
    # float32 is enough if every direction has more variance than rounding takes away
    identity = FLOAT32_RIDGE * torch.eye(targets[0].covariance.shape[0], dtype=torch.float64)
    identity[-1, -1] = 0
    pairs = []
    for target in targets:
        covariance = target.covariance + target.covariance.diagonal().mean() * identity
        pairs.append(((target.root @ target.functions).float(), covariance.float()))
    scale = sum((weighted @ covariance * weighted).sum() for weighted, covariance in pairs)
    if scale == 0:
        return latent
    latent = latent.float().requires_grad_()
    optimizer = torch.optim.LBFGS([latent], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0
        for weighted, covariance in pairs:
            seen = latent @ covariance
            variance = seen @ latent.T
            ridge = variance.diagonal().mean() * torch.eye(len(latent))
            root, has_failed = torch.linalg.cholesky_ex(variance + 1e-6 * ridge)
            # a step of the line search may make channels nearly the same
            if has_failed:
                root = torch.linalg.cholesky(variance + 1e-3 * ridge)
            loss = loss - torch.linalg.solve_triangular(root, seen @ weighted.T, upper=False).square().sum() / scale
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return latent.detach().double()


def _mean_covariance(targets: list[Target]) -> Tensor:
    return sum(target.covariance for target in targets) / len(targets)


def _uncorrelated(rows: Tensor, covariance: Tensor) -> Tensor:
    """A basis of the space of `rows` [k d+1] whose channels are uncorrelated and have a variance of 1."""
    if not len(rows):
        return rows
    variances, directions = torch.linalg.eigh(rows @ covariance @ rows.T)
    return (directions / variances.clamp(min=NEGLIGIBLE**2 * variances[-1]).sqrt()).T @ rows
