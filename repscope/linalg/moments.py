"""Means and covariances of rows that stream by, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from repscope._checks import as_features, as_tensor, check_finite
from repscope.errors import MetricError, NonFiniteError, NotEnoughSamples, UsageError
from repscope.linalg.covariance import degrees_of_freedom, multiply_transposed

# Rows converted to float64 at a time: bounds the copy, keeps the GEMM efficient.
_BLOCK_ROWS = 8192
_GATHERED_ROWS = 1024


class _Sums(NamedTuple):
    """Count, mean (as origin + offset) and centred scatter of some rows."""

    n: int
    origin: Tensor
    offset: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, rows: Tensor, origin: Tensor) -> _Sums:
        return cls.around(rows - origin, origin)  # in float64, as origin is

    @classmethod
    def around(cls, shifted: Tensor, origin: Tensor) -> _Sums:
        n, offset, scatter = len(shifted), shifted.mean(0), multiply_transposed(shifted)
        # Usually the origin is close, and a correction of rank one loses no digit.
        if bool((2 * n * offset.square() <= scatter.diagonal()).all()):
            scatter -= torch.outer(offset, n * offset)
        else:
            scatter = multiply_transposed(shifted - offset)
        return cls(n, origin, offset, scatter)

    def __or__(self, other: _Sums) -> _Sums:
        # Chan, Golub and LeVeque (1983). Origins lie close together, so their
        # difference is exact where the difference of the means would cancel.
        n = self.n + other.n
        gap = (other.origin - self.origin) + (other.offset - self.offset)
        weight = other.n / n
        return _Sums(
            n,
            self.origin,
            self.offset + gap * weight,
            self.scatter + other.scatter + torch.outer(gap, gap) * (self.n * weight),
        )


class _Ranks:
    """What sums need of a process group of ``torch.distributed``.

    Args:
        group: The group; None for all ranks.

    Raises:
        UsageError: If this process is in no such group.
    """

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        ready = dist.is_available() and dist.is_initialized()
        if not ready or dist.get_rank(group) < 0:
            raise UsageError(
                "all_reduce needs a process group that this process belongs to; call "
                "torch.distributed.init_process_group first"
            )
        self._dist, self._group = dist, group
        self.rank = dist.get_rank(group)
        # NCCL alone cannot send what is on the CPU.
        nccl = dist.get_backend(group) == "nccl"
        index = torch.cuda.current_device() if nccl else 0
        self.device = torch.device("cuda", index) if nccl else torch.device("cpu")

    def gather(self, *values: int) -> list[list[int]]:
        """Return the values of every rank, in order."""
        own = torch.tensor(values, device=self.device)
        n = self._dist.get_world_size(self._group)
        every = [torch.empty_like(own) for _ in range(n)]
        self._dist.all_gather(every, own, group=self._group)
        return [each.tolist() for each in every]

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks, where ``value`` is."""
        sent = value.to(self.device, copy=True)
        self._dist.all_reduce(sent, group=self._group)
        return sent.to(value.device)


class Moments:
    r"""Stream mean and covariance over blocks of rows, mergeable across workers.

    Blocks are shifted by the mean of the first one, summed in float64 and merged by
    :math:`S = S_a + S_b + \frac{n_a n_b}{n_a + n_b}\,\delta\delta^\top`, so the result
    does not depend on how the rows were cut, even when the mean is a million times
    the spread.

    Args:
        finite: Refuse rows that are not finite. Otherwise they are taken in, and mean
            and covariance are NaN from then on.

    References:
        Chan, Golub and LeVeque (1983), Algorithms for computing the sample variance,
        The American Statistician 37(3).

    Example:
        >>> moments = Moments().update([[1.0, 0.0]]).update([[3.0, 4.0]])
        >>> moments.count, moments.mean.tolist()
        (2, [2.0, 2.0])
        >>> moments.covariance().tolist()
        [[2.0, 4.0], [4.0, 8.0]]
    """

    def __init__(self, *, finite: bool = True) -> None:
        self._finite = finite
        self._sums: _Sums | None = None

    def __repr__(self) -> str:
        width = None if self._sums is None else len(self._sums.origin)
        return f"Moments(count={self.count}, n_features={width})"

    def update(self, X: Any) -> Moments:
        """Take in more rows.

        Args:
            X: Features, shape ``(n_samples, n_features)``; no rows is no change.

        Returns:
            Itself, so that calls chain.

        Raises:
            MetricError: If ``X`` is not a matrix.
            NonFiniteError: If it is not finite, and should be.
        """
        try:
            rows = as_features(X, minimum=0)
        except NonFiniteError:
            if self._finite:
                raise
            rows = as_tensor(X)
        if rows.ndim != 2:
            raise MetricError(
                f"Moments.update takes (n_samples, n_features), got "
                f"{tuple(rows.shape)}; flatten the leading dimensions first"
            )
        sums = self._sums
        for block in torch.split(rows, _BLOCK_ROWS) if len(rows) else ():
            origin = block.mean(0, dtype=torch.float64) if sums is None else sums.origin
            self._check_width(len(origin), rows.shape[1])
            fresh = _Sums.of(block, origin)
            sums = fresh if sums is None else sums | fresh
        self._accept(sums)
        return self

    def merge(self, other: Moments) -> Moments:
        """Take in the rows another ``Moments`` has seen; the other stays as it is.

        Args:
            other: Moments over the same features.

        Returns:
            Itself, so that calls chain.
        """
        if other._sums is None:
            return self
        if self._sums is None:
            self._sums = other._sums
            return self
        self._check_width(len(self._sums.origin), len(other._sums.origin))
        self._accept(self._sums | other._sums)
        return self

    def all_reduce(self, group: Any = None) -> Moments:
        r"""Take in the rows that all ranks of a process group have seen.

        Every rank calls it, those without rows too, and every rank holds the same
        afterwards. They agree on one origin and on the mean of all rows, and sum
        :math:`S_r + n_r\,\delta_r\delta_r^\top` with :math:`\delta_r` the mean of a
        rank less that of all: ``O(n_features**2)`` numbers are sent, however many rows
        there were.

        Args:
            group: A process group of ``torch.distributed``; None for all ranks.

        Returns:
            Itself, so that calls chain.

        Raises:
            MetricError: On every rank, if they have seen different numbers of features
                or the squared deviations leave the float64 range; nothing is changed.
            UsageError: If this process is in no such group.
        """  # noqa: DOC502 - partly raised by the group
        ranks, own = _Ranks(group), self._sums
        seen = ranks.gather(self.count, 0 if own is None else len(own.origin))
        widths = sorted({width for n, width in seen if n})
        if len(widths) > 1:
            raise MetricError(
                f"the ranks have seen {' and '.join(map(str, widths))} features; "
                f"reduce the Moments of the same layer on every rank"
            )
        if not widths:
            return self
        home = ranks.device if own is None else own.origin.device
        zeros = torch.zeros(widths[0], dtype=torch.float64, device=home)
        leads = ranks.rank == next(rank for rank, (n, _) in enumerate(seen) if n)
        origin = ranks.total(own.origin if own is not None and leads else zeros)
        if own is None:
            own = _Sums(0, origin, zeros, torch.outer(zeros, zeros))
        total = sum(n for n, _ in seen)
        gap = (own.origin - origin) + own.offset
        offset = ranks.total(gap * (own.n / total))
        apart = gap - offset
        scatter = ranks.total(own.scatter + torch.outer(apart, apart) * own.n)
        self._accept(_Sums(total, origin, offset, scatter))
        return self

    def to_tensor(self) -> Tensor:
        """Return all there is as one tensor, which `from_tensor` takes back.

        Returns:
            Float64 on the CPU, shape ``(n_features + 3, n_features)``: in row 0 the
            count in every column, in row 1 the origin, in row 2 the offset (the mean
            is origin + offset), then the sum of the outer products of the deviations.

        Raises:
            NotEnoughSamples: If no rows were seen.

        Example:
            >>> Moments().update([[1.0, 0.0], [3.0, 4.0]]).to_tensor()
            tensor([[2., 2.],
                    [2., 2.],
                    [0., 0.],
                    [2., 4.],
                    [4., 8.]], dtype=torch.float64)
        """  # noqa: DOC502 - raised where the sums are looked up
        sums = self._seen()
        head = [torch.full_like(sums.origin, sums.n), sums.origin, sums.offset]
        return torch.cat([torch.stack(head), sums.scatter]).cpu()

    @classmethod
    def from_tensor(cls, t: Any) -> Moments:
        """Return the moments that `to_tensor` described.

        Args:
            t: Shape ``(n_features + 3, n_features)``, float64; it is copied.

        Returns:
            New moments, equal to the last bit.

        Raises:
            MetricError: If ``t`` has another shape or dtype, or holds what `to_tensor`
                never returns.
        """
        packed = as_tensor(t).clone()
        whole = packed.ndim == 2 and packed.shape[0] == packed.shape[-1] + 3 > 3
        if not whole or packed.dtype != torch.float64:
            raise MetricError(
                f"moments are one float64 tensor (n_features + 3, n_features), got "
                f"{packed.dtype} of shape {tuple(packed.shape)}"
            )
        check_finite(packed, name="the moments")
        (counts, origin, offset), scatter = packed[:3], packed[3:]
        n = int(counts[0])
        if n < 1 or bool((counts != n).any() or (scatter.diagonal() < 0).any()):
            raise MetricError(
                f"these are no moments: row 0 starts with {float(counts[0])}, which "
                f"should be one positive count in every column, or the diagonal of the "
                f"scatter has a negative entry"
            )
        moments = cls()
        moments._sums = _Sums(n, origin, offset, scatter)
        return moments

    @property
    def count(self) -> int:
        """Rows seen."""
        return 0 if self._sums is None else self._sums.n

    @property
    def mean(self) -> Tensor:
        """Mean of each feature, float64, shape ``(n_features,)``."""
        sums = self._seen()
        return sums.origin + sums.offset

    def covariance(self, *, ddof: int = 1) -> Tensor:
        """Return the covariance of all rows seen.

        Args:
            ddof: Delta degrees of freedom of the normalisation.

        Returns:
            Float64 tensor of shape ``(n_features, n_features)``.
        """
        sums = self._seen()
        return sums.scatter / degrees_of_freedom(sums.n, ddof=ddof)

    def _seen(self) -> _Sums:
        if self._sums is None:
            raise NotEnoughSamples("these Moments have seen no rows; call update first")
        return self._sums

    def _accept(self, sums: _Sums | None) -> None:
        # A finite diagonal bounds every entry of a scatter matrix.
        spread = None if sums is None else sums.scatter.diagonal()
        if self._finite and spread is not None and not bool(spread.isfinite().all()):
            raise MetricError(
                "the squared deviations leave the float64 range; divide the features "
                "by a common scale first"
            )
        self._sums = sums

    @staticmethod
    def _check_width(ours: int, theirs: int) -> None:
        if ours != theirs:
            raise MetricError(
                f"these Moments have {ours} features, the new rows {theirs}"
            )


class Gathering:
    """Takes few rows at a time: one product over many costs less than many over few.

    Its memory does not grow with the number of rows. Rows that are not finite make
    what it says NaN, except the count.

    Example:
        >>> gathering = Gathering()
        >>> for row in ([[1.0, 0.0]], [[3.0, 4.0]]):
        ...     gathering.update(torch.tensor(row))
        >>> gathering.finish().mean.tolist()
        [2.0, 2.0]
    """

    def __init__(self) -> None:
        self._done = Moments(finite=False)
        self._rows: Tensor | None = None  # those that wait, less the origin
        self._waiting = 0
        self._sums: _Sums | None = None  # around the origin, not the mean

    def update(self, rows: Tensor) -> None:
        """Take in rows.

        Args:
            rows: ``(n_samples, n_features)`` on the CPU; they may be reused afterwards.

        Raises:
            MetricError: If there were other numbers of features before.
        """  # noqa: DOC502 - raised by the check
        for block in torch.split(rows, _GATHERED_ROWS) if len(rows) else ():
            if self._sums is None:
                self._begin(block.mean(0, dtype=torch.float64))
            self._sums = cast("_Sums", self._sums)
            Moments._check_width(len(self._sums.origin), rows.shape[1])
            if self._rows is None or self._rows.shape[1] != rows.shape[1]:
                size = _GATHERED_ROWS, rows.shape[1]
                self._rows = torch.empty(size, dtype=torch.float64)
            if self._waiting + len(block) > _GATHERED_ROWS:
                self._fold()
            place = self._rows[self._waiting : self._waiting + len(block)]
            torch.sub(block, self._sums.origin, out=place)
            self._waiting += len(block)

    def _begin(self, origin: Tensor) -> None:
        zero = torch.zeros_like(origin)
        self._sums = _Sums(0, origin, zero, torch.outer(zero, zero))

    def _fold(self) -> None:
        """Add up the rows that wait."""
        n, rows, sums = self._waiting, self._rows, self._sums
        if not n or rows is None or sums is None:
            return
        self._waiting = 0
        shifted = rows[:n]
        total, products = shifted.sum(0), multiply_transposed(shifted)
        if bool((2 * total.square() > n * products.diagonal()).any()):
            # The mean has drifted away: a new origin, before digits are lost.
            self._settle()
            mean = total / n
            self._begin(sums.origin + mean)
            shifted -= mean
            total, products = shifted.sum(0), multiply_transposed(shifted)
            sums = cast("_Sums", self._sums)
        sums.offset.add_(total)
        sums.scatter.add_(products)
        self._sums = sums._replace(n=sums.n + n)

    def _settle(self) -> None:
        """Turn sums around the origin into moments, and begin anew."""
        sums, self._sums = self._sums, None
        if sums is not None and sums.n:
            n, origin, total, products = sums
            scatter = products - torch.outer(total / n, total)
            moments = Moments(finite=False)
            moments._sums = _Sums(n, origin, total / n, scatter)
            self._done.merge(moments)

    def finish(self) -> Moments:
        """Return the moments of the rows since the last call, and begin anew."""
        self._fold()
        self._settle()
        moments, self._done = self._done, Moments(finite=False)
        return moments
