"""Eigenvalues on CUDA by the batched solver of the cuSOLVER that torch has loaded.

``cusolverDnXsyevBatched``, new in cuSOLVER 11.7.1 (CUDA 12.6.2), decomposes a whole
batch in one call. It is called with ctypes, so torch is all it needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repscope.linalg.routes import Unavailable
from repscope.linalg.routes.invariants import checked

# Workspace of one call, beyond which the batch is cut. A single matrix may take more.
WORKSPACE_BYTES = 1 << 30
# 40,000 matrices in one call were reported to return INVALID_VALUE (mjlab pull 732).
MATRICES = 32_768
# NVIDIA documents n * lda * batch <= INT32_MAX for this function.
ELEMENTS = 2**31 - 1

_FILE_NAMES = ("libcusolver.so", "libcusolver-")

_NO_VECTORS = 0  # CUSOLVER_EIG_MODE_NOVECTOR
_LOWER = 0  # CUBLAS_FILL_MODE_LOWER
_DATA_TYPES = {torch.float32: 0, torch.float64: 1}  # CUDA_R_32F, CUDA_R_64F

_STATUS = {
    1: "NOT_INITIALIZED",
    2: "ALLOC_FAILED",
    3: "INVALID_VALUE",
    4: "ARCH_MISMATCH",
    5: "MAPPING_ERROR",
    6: "EXECUTION_FAILED",
    7: "INTERNAL_ERROR",
    8: "MATRIX_TYPE_NOT_SUPPORTED",
    9: "NOT_SUPPORTED",
    31: "INVALID_WORKSPACE",
}
# What too large a batch returns, where the limit is the memory's or undocumented.
_TOO_LARGE = (2, 3)

_PROBLEM = (
    *(c_void_p, c_void_p, c_int, c_int, c_int64),  # handle, params, jobz, uplo, n
    *(c_int, c_void_p, c_int64),  # type of A, A, lda
    *(c_int, c_void_p, c_int),  # type of W, W, type to compute in
)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cusolverDnCreate": (POINTER(c_void_p),),
    "cusolverDnDestroy": (c_void_p,),
    "cusolverDnCreateParams": (POINTER(c_void_p),),
    "cusolverDnDestroyParams": (c_void_p,),
    "cusolverDnSetStream": (c_void_p, c_void_p),
    "cusolverDnXsyevBatched_bufferSize": (
        *_PROBLEM,
        *(POINTER(c_size_t), POINTER(c_size_t)),  # bytes on the device, on the host
        c_int64,  # batch
    ),
    "cusolverDnXsyevBatched": (
        *_PROBLEM,
        *(c_void_p, c_size_t),  # workspace on the device
        *(c_void_p, c_size_t),  # workspace on the host
        *(c_void_p, c_int64),  # info, batch
    ),
}


def eigenvalues(C: Tensor) -> Tensor:
    """Return the eigenvalues of symmetric matrices in ascending order.

    ``C`` itself stays as it is, so that another route can serve it if this one fails.
    The calls go to torch's current stream of the device.

    Args:
        C: Symmetric finite matrices on a CUDA device, shape ``(batch, n, n)``,
            contiguous, float32 or float64.

    Returns:
        Shape ``(batch, n)``, ascending, of the dtype and on the device of ``C``.

    Raises:
        Unavailable: If ``C`` is not on a CUDA device, cuSOLVER is not found or too old,
            a call of it fails, a matrix does not converge, or the values are not
            those of ``C``.
    """
    if not C.is_cuda:
        raise Unavailable(f"cuSOLVER serves CUDA devices, not {C.device}")
    with torch.cuda.device(C.device):
        solver = _of_torch()
        if isinstance(solver, str):
            raise Unavailable(solver)
        return solver.eigenvalues(C, torch.cuda.current_stream().cuda_stream)


class Cusolver:
    """The functions of a cuSOLVER library that find eigenvalues of batches.

    Args:
        library: The library as ``ctypes.CDLL`` returns it.

    Raises:
        Unavailable: If the library lacks one of the functions.
    """

    def __init__(self, library: Any) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name, None)
            if function is None:
                raise Unavailable(
                    f"cuSOLVER {_version(library)} has no {name}: that came with "
                    f"11.7.1 (CUDA 12.6.2)"
                )
            function.argtypes = arguments
            function.restype = c_int
        self._library = library
        self._idle: dict[int | None, list[_Handle]] = {}

    def eigenvalues(self, C: Tensor, stream: int) -> Tensor:
        """Return the eigenvalues of ``C``, on whose device the caller has to be.

        Args:
            C: As in the function of this name.
            stream: Address of torch's current CUDA stream.

        Returns:
            Shape ``(batch, n)``, ascending.
        """
        with self._lent(C.device.index) as handle:
            self._call("cusolverDnSetStream", handle.solver, stream)
            parts = self._in_chunks(handle, C)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _in_chunks(self, handle: _Handle, C: Tensor) -> list[Tensor]:
        n = C.shape[-1]
        size = max(1, min(len(C), MATRICES, ELEMENTS // n**2))
        parts: list[Tensor] = []
        start = 0
        while start < len(C):
            chunk = C[start : start + size]
            try:
                parts.append(self._of_chunk(handle, chunk))
            except (torch.OutOfMemoryError, _TooLarge) as error:
                if len(chunk) == 1:
                    raise Unavailable(f"one {n} x {n} matrix fails: {error}") from error
                size = len(chunk) // 2
            else:
                start += len(chunk)
        return parts

    def _of_chunk(self, handle: _Handle, C: Tensor) -> Tensor:
        batch, n, _ = C.shape
        W = C.new_empty(batch, n)
        info = C.new_zeros(batch, dtype=torch.int32)
        device, host = self._workspace(_problem(handle, C, W), C)
        A = C.clone()
        self._call(
            "cusolverDnXsyevBatched",
            *_problem(handle, A, W),
            *(device.data_ptr(), device.numel()),
            *(host.data_ptr(), host.numel()),
            *(info.data_ptr(), batch),
        )
        # Waits for the stream, once a chunk. Then the workspaces are free to go, and
        # the handle may serve another thread and stream.
        if bool(info.any()):
            failed = info.nonzero().flatten()
            raise Unavailable(
                f"cuSOLVER gave up on {len(failed)} of {batch} matrices of size {n}: "
                f"info is {int(info[failed[0]])} for the first"
            )
        return checked(W, C, of="cuSOLVER")

    def _workspace(self, problem: Sequence[Any], C: Tensor) -> tuple[Tensor, Tensor]:
        device, host = c_size_t(), c_size_t()
        self._call(
            "cusolverDnXsyevBatched_bufferSize",
            *problem,
            *(byref(device), byref(host)),
            len(C),
        )
        if device.value > WORKSPACE_BYTES and len(C) > 1:
            raise _TooLarge(f"the workspace would take {device.value} bytes")
        return _scratch(device.value, C.device), _scratch(host.value, "cpu")

    @contextlib.contextmanager
    def _lent(self, device: int | None) -> Iterator[_Handle]:
        # A handle serves one thread at a time, and holds up to 32 MiB of its device. As
        # in torch, handles go from thread to thread: there are never more than calls
        # at once, however many threads come and go. They are not destroyed at exit,
        # when the CUDA driver may be gone already.
        idle = self._idle.setdefault(device, [])
        try:
            handle = idle.pop()
        except IndexError:
            handle = self._create()
        try:
            yield handle
        except BaseException:
            self._library.cusolverDnDestroyParams(handle.params)
            self._library.cusolverDnDestroy(handle.solver)
            raise
        idle.append(handle)

    def _create(self) -> _Handle:
        handle = _Handle(c_void_p(), c_void_p())
        self._call("cusolverDnCreate", byref(handle.solver))
        try:
            self._call("cusolverDnCreateParams", byref(handle.params))
        except Unavailable:
            self._library.cusolverDnDestroy(handle.solver)
            raise
        return handle

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            error = _TooLarge if status in _TOO_LARGE else Unavailable
            raise error(f"{name} returned {_STATUS.get(status, 'status')} ({status})")


class _Handle(NamedTuple):
    solver: c_void_p
    params: c_void_p


class _TooLarge(Unavailable):
    """A smaller batch may pass."""


def _problem(handle: _Handle, A: Tensor, W: Tensor) -> tuple[Any, ...]:
    # cuSOLVER reads columns where torch wrote rows: the transpose, which is the same
    # matrix. For that reason either triangle serves.
    n, kind = A.shape[-1], _DATA_TYPES[A.dtype]
    return (
        *(*handle, _NO_VECTORS, _LOWER, n),
        *(kind, A.data_ptr(), n),
        *(kind, W.data_ptr(), kind),
    )


def _scratch(n_bytes: int, device: torch.device | str) -> Tensor:
    # Zeros: cuSOLVER 11.7.1 reads of its workspace what it has not written, and returns
    # wrong results when an allocator hands out used memory (pytorch issue 192483).
    return torch.zeros(max(1, n_bytes), dtype=torch.uint8, device=device)


@functools.cache
def _of_torch() -> Cusolver | str:
    # Looked for once: a reason is returned rather than raised to be kept as well.
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    try:
        # torch loads its linear algebra, and cuSOLVER with it, at the first use.
        torch.linalg.eigvalsh(torch.eye(2, device="cuda"))
    except RuntimeError as error:  # which may be a lack of memory, and pass
        raise Unavailable(f"torch.linalg.eigvalsh fails: {error}") from error
    site = Path(torch.__file__).parents[1]
    try:
        return Cusolver(_opened(_candidates(_maps(), site, torch.version.cuda)))
    except Unavailable as error:
        return str(error)


def _maps() -> str:
    try:
        return Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _candidates(maps: str, site: Path, cuda: str) -> list[str]:
    """Return where cuSOLVER may be: mapped, in a wheel beside torch, where ld looks."""
    fields = [line.split(maxsplit=5) for line in maps.splitlines()]
    # Some wheels rename it to libcusolver-<hash>.so; libcusolverMg is another library.
    mapped = [
        field[5]
        for field in fields
        if len(field) == 6 and Path(field[5]).name.startswith(_FILE_NAMES)
    ]
    major = int(cuda.split(".")[0])
    wheels = [
        str(path)
        for folder in (f"cu{major}", "cusolver")
        for path in sorted(site.glob(f"nvidia/{folder}/lib/libcusolver.so.*"))
    ]
    # cuSOLVER 11 belongs to CUDA 12, 12 to CUDA 13.
    return list(dict.fromkeys([*mapped, *wheels, f"libcusolver.so.{major - 1}"]))


def _opened(candidates: Sequence[str]) -> Any:
    for path in candidates:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(path)
    raise Unavailable(f"cuSOLVER is not found: tried {', '.join(candidates)}")


def _version(library: Any) -> str:
    version = c_int()
    if library.cusolverGetVersion(byref(version)):
        return "of unknown version"
    major, rest = divmod(version.value, 1000)
    return f"{major}.{rest // 100}.{rest % 100}"
