"""Least squares: the smallest change of a matrix that makes it give what is missing."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.rewrite.rows import LinearLayer

RIDGES = (1e-1, 1e-2, 1e-3, 1e-5, 1e-12)  # times the mean square of what is read
LARGE = 6000  # columns: of more, no square matrix is made
FEW = 4096  # rows that are fitted then
ROWS = 64  # that are fitted for each column otherwise: more hardly change the result


@dataclass(frozen=True)
class Change:
    """A change of a layer: ``rows @ matrix + intercept`` is added to what it gives.

    Attributes:
        matrix: float64[groups, columns, outputs].
        intercept: float64[groups, 1, outputs].
    """

    matrix: Tensor
    intercept: Tensor

    def give(self, rows: Tensor) -> Tensor:
        """float64[groups, rows, outputs]: what it adds."""
        return (rows @ self.matrix.to(rows)).double() + self.intercept


def fit_changes(rows: Iterable[Sequence[Tensor]], layer: LinearLayer, shifted: bool) -> list[Change]:
    """The change that leaves least of what is missing, for each of ``RIDGES`` that has one.

    Minimizes the mean over rows of |missing - rows @ matrix - intercept|^2 + ridge |matrix|^2, group by group.

    Args:
        rows: batches of (what is read, what is missing, ...): float[groups, rows, columns] and [groups, rows, outputs].
        layer: whose change it is.
        shifted: whether an intercept can go to what follows the layer; a bias takes one, too.
    """
    intercept = layer.bias is not None or shifted
    return fit_rows(rows, intercept) if layer.columns > LARGE else fit_sums(rows, intercept)


def count_rows(layer: LinearLayer) -> int:
    """How many rows are enough to fit a change of ``layer``."""
    return FEW if layer.columns > LARGE else ROWS * (layer.columns + 1)


def fit_sums(rows: Iterable[Sequence[Tensor]], intercept: bool) -> list[Change]:
    """From the sums of squares and products, [columns, columns] and [columns, outputs], in float64."""
    count, sums = 0, list[Tensor]()
    for x, missing, *_ in rows:
        constant = torch.ones_like(x[:, :, :1])
        more = [(a.mT @ b).double() for a, b in ((x, x), (x, missing), (constant, x), (constant, missing))]
        sums = [total + part for total, part in zip(sums, more, strict=True)] if sums else more
        count += x.shape[1]
    squares, products, of_rows, of_missing = sums
    mean, missed = (part / count if intercept else torch.zeros_like(part) for part in (of_rows, of_missing))
    squares = squares / count - mean.mT @ mean
    products = products / count - mean.mT @ missed
    changes = []
    for factor in factor_with_ridges(squares):
        matrix = torch.cholesky_solve(products, factor)
        changes.append(Change(matrix, missed - mean @ matrix))
    return changes


def fit_rows(rows: Iterable[Sequence[Tensor]], intercept: bool) -> list[Change]:
    """From products of some rows with each other, [rows, rows]: the same minimum by the matrix inversion lemma."""
    parts = [(x, missing.double()) for x, missing, *_ in rows]
    x, missing = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    _, count, columns = x.shape
    mean, missed = (part.mean(1, keepdim=True) if intercept else torch.zeros_like(part[:, :1]) for part in (x, missing))
    x = x - mean
    changes = []
    for factor in factor_with_ridges((x @ x.mT).double(), count / columns):
        matrix = (x.mT @ torch.cholesky_solve(missing - missed, factor).to(x)).double()
        changes.append(Change(matrix, missed - mean.double() @ matrix))
    return changes


def factor_with_ridges(squares: Tensor, share: float = 1.0) -> Iterator[Tensor]:
    """The Cholesky factors of ``squares``, float64[groups, size, size], with each ridge that makes it definite.

    ``share``: the size over the number of weights, by which the mean of the diagonal is more than that of the columns.
    """
    diagonal = squares.diagonal(dim1=1, dim2=2)
    for ridge in RIDGES:
        added = (ridge * share * diagonal.mean(1, keepdim=True)).clamp_min(torch.finfo(squares.dtype).tiny)
        factor, problem = torch.linalg.cholesky_ex(squares + torch.diag_embed(added.expand_as(diagonal)))
        if not problem.any() and factor.isfinite().all():
            yield factor
