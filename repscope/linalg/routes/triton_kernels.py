r"""The kernels of the route through Triton; importing this imports Triton.

The steps are those of ``tridiagonal``, one program per matrix. What is chosen for speed
is unmeasured.
"""

import triton
import triton.language as tl


@triton.jit
def _power_of_two(x):
    """Return ``x`` without its mantissa."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    else:
        bits = x.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def _total(x):
    return tl.sum(tl.sum(x, 0), 0)


@triton.jit
def _root(x):
    """Return the root, rounded: in float32 plain ``sqrt`` may be an ulp off."""
    root = tl.sqrt(x)
    if x.dtype == tl.float32:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def _quotient(x, y):
    """Return the quotient, rounded: in float32 plain ``/`` may be two ulps off."""
    quotient = x / y
    if y.dtype == tl.float32:
        quotient = tl.div_rn(x, y)
    return quotient


@triton.jit(do_not_specialize=["n"])
def tridiagonalise(
    C, scale, d, e, n, ZERO: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr
):
    r"""Make one matrix tridiagonal, in registers.

    By symmetry, row k stands for the column that reflection k clears. The tile is read
    once for :math:`A v` and once for the next row, a product with a unit vector; the
    update is :math:`A - v q^\top - q v^\top`.

    The columns of the tile are two axes, ``(BLOCK // 32, 32)``, around that of the
    rows. So Triton gives rows, not columns, to different warps, and a sum over columns
    needs no barrier.

    Args:
        C: Pointer to ``(batch, n, n)``.
        scale: Pointer to ``(batch,)``, written here.
        d: Pointer to ``(batch, n)``, written here.
        e: Pointer to ``(batch, n)``, written here.
        n: At most ``BLOCK``.
        ZERO: ``tridiagonal.floor`` of the dtype.
        TINY: The smallest normal number of the dtype.
        BLOCK: A power of two, at least 32.
    """
    matrix = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    row = tl.arange(0, BLOCK)[None, :, None]
    inside = (row < n) & (column < n)[:, None, :]
    at = C + (matrix * n + row) * n + column[:, None, :]
    A = tl.load(at, mask=inside, other=0.0)
    # Neither the power nor 1 over it leaves the normal numbers.
    power = _power_of_two(tl.max(tl.max(tl.max(tl.abs(A), 1), 0), 0))
    power = tl.minimum(tl.maximum(power, TINY), 1 / TINY)
    A *= _quotient(1.0, power)

    x = tl.sum(tl.where(row == 0, A, 0.0), 1)
    diagonal = x
    beside = tl.zeros_like(x)
    for k in range(n - 1):
        first = _total(tl.where(column == k + 1, x, 0.0))
        x = tl.where(column > k, x, 0.0)
        norm = _root(_total(x * x))
        sign = tl.where(first < 0, -1.0, 1.0).to(x.dtype)
        kept = tl.where(norm > ZERO, 1.0, 0.0).to(x.dtype)
        # A reflection that is not quite orthogonal adds its error to all others, so
        # these are rounded; a division of a count may be off.
        inverse = _quotient(kept, tl.maximum(norm, ZERO))
        head = first * inverse + kept * sign
        v = tl.where(column == k + 1, head, x * inverse)
        beta = _quotient(kept, tl.maximum(tl.abs(head), 1.0))  # 2 / (v . v), or 0
        beside = tl.where(column == k, -kept * sign * norm, beside)

        v_rows = tl.reshape(v, (BLOCK,))[None, :, None]
        p = tl.where(column > k, beta * tl.sum(A * v_rows, 1), 0.0)
        q = p - 0.5 * beta * _total(p * v) * v
        q_rows = tl.reshape(q, (BLOCK,))[None, :, None]
        A = A - v_rows * q[:, None, :] - q_rows * v[:, None, :]
        next_row = tl.where(row == k + 1, 1.0, 0.0).to(A.dtype)
        x = tl.sum(A * next_row, 1)
        diagonal = tl.where(column == k + 1, x, diagonal)

    tl.store(scale + matrix, power)
    tl.store(d + matrix * n + column, diagonal, mask=column < n)
    tl.store(e + matrix * n + column, beside, mask=column < n)


@triton.jit(do_not_specialize=["n"])
def bisect(
    scale, d, e, w, n, STEPS: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr
):
    """Find the eigenvalues of one tridiagonal matrix, one to a lane.

    Args:
        scale: Pointer to ``(batch,)``.
        d: Pointer to ``(batch, n)``.
        e: Pointer to ``(batch, n)``.
        w: Pointer to ``(batch, n)``, written here.
        n: At most ``BLOCK``.
        STEPS: ``tridiagonal.steps`` of the dtype.
        ZERO: ``tridiagonal.floor`` of the dtype.
        BLOCK: A power of two.
    """
    matrix = tl.program_id(0).to(tl.int64)
    d += matrix * n
    e += matrix * n
    index = tl.arange(0, BLOCK)
    inside = index < n
    radius = tl.abs(tl.load(d + index, mask=inside, other=0.0))
    radius += tl.abs(tl.load(e + index, mask=inside, other=0.0))
    radius += tl.abs(tl.load(e + index - 1, mask=inside & (index > 0), other=0.0))
    high = tl.max(radius, 0) + tl.zeros_like(radius)
    low = -high
    for _ in range(STEPS):
        x = 0.5 * (low + high)
        below = tl.zeros_like(index)
        pivot = tl.zeros_like(x) + 1.0
        beside = tl.load(e + n - 1)  # 0
        for k in range(n):
            pivot = tl.load(d + k) - x - beside * beside / pivot
            # Counted as it is divided by: see tridiagonal.count_below.
            pivot = tl.where(tl.abs(pivot) < ZERO, -ZERO, pivot)
            below += (pivot < 0).to(tl.int32)
            beside = tl.load(e + k)
        right = below <= index
        low = tl.where(right, x, low)
        high = tl.where(right, high, x)
    w += matrix * n
    tl.store(w + index, 0.5 * (low + high) * tl.load(scale + matrix), mask=inside)
