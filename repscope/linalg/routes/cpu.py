"""Eigenvalues on a CPU: the LAPACK of torch, of numpy and of scipy.

Each takes symmetric matrices ``(batch, n, n)``, contiguous and finite, leaves them as
they are, and returns the eigenvalues ``(batch, n)`` in ascending order.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repscope.linalg.routes import Unavailable
from repscope.linalg.threads import blas_threads, in_threads

# From here on BLAS has enough to do in one matrix to keep several threads busy.
ONE_MATRIX_FILLS_THREADS = 1024


def by_torch(C: Tensor) -> Tensor:
    """Return eigenvalues by ``torch.linalg.eigvalsh``.

    Args:
        C: See the module.

    Returns:
        See the module.

    Raises:
        Unavailable: If LAPACK gives up.
    """
    try:
        values: Tensor = torch.linalg.eigvalsh(C)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # no stub
        raise Unavailable(str(error)) from error
    return values


def by_numpy(C: Tensor) -> Tensor:
    """Return eigenvalues by ``np.linalg.eigvalsh``, which computes in float64.

    Args:
        C: See the module.

    Returns:
        See the module.

    Raises:
        Unavailable: If the matrices are not on the CPU, or LAPACK gives up.
    """
    plain = _on_cpu(C, "numpy")

    def slice_of(start: int, stop: int) -> np.ndarray[Any, Any]:
        return np.linalg.eigvalsh(plain[start:stop])

    try:
        return torch.from_numpy(np.concatenate(_spread(slice_of, C)))
    except np.linalg.LinAlgError as error:
        raise Unavailable(str(error)) from error


def by_scipy(C: Tensor) -> Tensor:
    """Return eigenvalues by scipy's ``syevd``, called without the interpreter lock.

    Its Python wrapper holds the lock and copies each matrix.

    Args:
        C: See the module.

    Returns:
        See the module.

    Raises:
        Unavailable: If the matrices are not on the CPU, or LAPACK gives up.
    """  # noqa: DOC502 - raised by what it calls
    plain = _on_cpu(C, "scipy")
    values = np.empty(plain.shape[:2], plain.dtype)

    def slice_of(start: int, stop: int) -> None:
        _syevd(plain[start:stop].copy(), values[start:stop])

    _spread(slice_of, C)
    return torch.from_numpy(values)


def _on_cpu(C: Tensor, name: str) -> np.ndarray[Any, Any]:
    if not C.is_cpu:
        raise Unavailable(
            f"{name} computes on the CPU, and the matrices are {C.device}"
        )
    return C.numpy()


def _spread(work: Callable[[int, int], Any], C: Tensor) -> list[Any]:
    if C.shape[-1] >= ONE_MATRIX_FILLS_THREADS:
        with blas_threads():
            return [work(0, len(C))]
    return in_threads(work, len(C), threads=torch.get_num_threads())


def _syevd(matrices: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> None:
    """Decompose each matrix, and destroy it."""
    n = ctypes.c_int(matrices.shape[-1])
    info, query = ctypes.c_int(), ctypes.c_int(-1)
    single = matrices.dtype == np.float32
    # The half that OpenBLAS reads faster, by 8 % at n = 512 in either dtype.
    job, half = ctypes.c_char(b"N"), ctypes.c_char(b"U" if single else b"L")
    front = [ctypes.addressof(job), ctypes.addressof(half), ctypes.addressof(n)]
    routine = _routine("ssyevd" if single else "dsyevd")

    def call(i: int, work: Any, size: Any, iwork: Any, isize: Any) -> None:
        routine(
            *front,
            matrices.ctypes.data + i * matrices.strides[0],
            front[2],
            values.ctypes.data + i * values.strides[0],
            work.ctypes.data,
            ctypes.addressof(size),
            iwork.ctypes.data,
            ctypes.addressof(isize),
            ctypes.addressof(info),
        )
        if info.value:
            raise Unavailable(f"syevd gave up with info {info.value}")

    best, ibest = np.empty(1, matrices.dtype), np.empty(1, np.int32)
    call(0, best, query, ibest, query)
    size, isize = ctypes.c_int(int(best[0])), ctypes.c_int(int(ibest[0]))
    work, iwork = np.empty(size.value, matrices.dtype), np.empty(isize.value, np.int32)
    for i in range(len(matrices)):
        call(i, work, size, iwork, isize)


@functools.cache
def _routine(name: str) -> Callable[..., None]:
    """Return a LAPACK routine that scipy offers to compiled code, as a function."""
    import scipy.linalg.cython_lapack

    capsule = scipy.linalg.cython_lapack.__pyx_capi__[name]
    signature = ctypes.pythonapi.PyCapsule_GetName
    signature.restype, signature.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype = ctypes.c_void_p
    pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 11)
    return kind(pointer(capsule, signature(capsule)))
