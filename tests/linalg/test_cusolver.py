"""The routes through cuSOLVER and CuPy, on a library that works in host memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import types
from ctypes import POINTER, c_double, c_float, c_int, c_int64, c_size_t, c_void_p

import numpy as np
import pytest
import torch

from repscope.linalg.routes import Unavailable, cupy, cusolver

# cusolverDn.h: enumerations are int, and so is what every function returns.
CREATE = [POINTER(c_void_p)]
PROBLEM = [
    *[c_void_p, c_void_p, c_int, c_int, c_int64],
    *[c_int, c_void_p, c_int64, c_int, c_void_p, c_int],
]
HEADER = {
    "cusolverGetVersion": [POINTER(c_int)],
    "cusolverDnCreate": CREATE,
    "cusolverDnDestroy": [c_void_p],
    "cusolverDnCreateParams": CREATE,
    "cusolverDnDestroyParams": [c_void_p],
    "cusolverDnSetStream": [c_void_p, c_void_p],
    "cusolverDnXsyevBatched_bufferSize": [
        *PROBLEM,
        *[POINTER(c_size_t), POINTER(c_size_t), c_int64],
    ],
    "cusolverDnXsyevBatched": [
        *PROBLEM,
        *[c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_int64],
    ],
}
CALLS = [
    "cusolverDnCreate",
    "cusolverDnCreateParams",
    "cusolverDnSetStream",
    "cusolverDnXsyevBatched_bufferSize",
    "cusolverDnXsyevBatched",
]
QUERY, SOLVE = CALLS[-2:]
REALS = {0: c_float, 1: c_double}  # CUDA_R_32F, CUDA_R_64F


class StandIn:
    """cuSOLVER in host memory, behind function pointers as a C library has them.

    What it is called with is read as the header says. A failed check, an exception in
    a callback, cannot pass through C: it is kept in ``errors``.
    """

    def __init__(self):
        self.factor = 1.0
        self.errors, self.batches, self.sizes, self.streams = [], [], [], []
        self.alive, self.stream_of, self.made = {}, {}, 0
        self.version, self.gave_up = 12401, {}
        self.status = lambda name, batch: 0
        self.while_solving = lambda: None
        self.callbacks = []
        for name, arguments in HEADER.items():
            setattr(self, name, self.exported(name, arguments))

    def exported(self, name, arguments):
        run = getattr(self, name.removeprefix("cusolver").lower())

        def call(*values):
            try:
                status = self.status(name, values[-1])
                return status or run(*values) or 0
            except BaseException as error:  # noqa: BLE001
                self.errors.append(error)
                return 7

        self.callbacks.append(ctypes.CFUNCTYPE(c_int, *arguments)(call))
        address = ctypes.cast(self.callbacks[-1], c_void_p).value
        # Without argument types, which the caller has to declare.
        return ctypes.CFUNCTYPE(c_int)(address)

    def create(self, out, kind):
        self.made += 1
        # Beyond 32 bits, as addresses are.
        out[0] = (1 << 40) + self.made
        self.alive[out[0]] = kind

    def getversion(self, out):
        out[0] = self.version

    def dncreate(self, out):
        self.create(out, "solver")

    def dncreateparams(self, out):
        self.create(out, "params")

    def dndestroy(self, solver):
        assert self.alive.pop(solver) == "solver"

    def dndestroyparams(self, params):
        assert self.alive.pop(params) == "params"

    def dnsetstream(self, solver, stream):
        assert self.alive[solver] == "solver"
        self.stream_of[solver] = stream

    def dnxsyevbatched_buffersize(self, *values):
        *problem, device, host, batch = values
        self.check(*problem)
        device[0], host[0] = self.bytes_for(problem[4], batch)

    def dnxsyevbatched(self, *values):
        *problem, device, device_bytes, host, host_bytes, info, batch = values
        self.check(*problem)
        solver, n, kind, A, W = (problem[i] for i in (0, 4, 5, 6, 9))
        assert (device_bytes, host_bytes) == self.bytes_for(n, batch)
        # As cuSOLVER 11.7.1 needs it.
        assert not any(ctypes.string_at(device, device_bytes))
        # Where they overlap with the matrices, the values come out wrong.
        ctypes.memset(device, 0xAB, device_bytes)
        ctypes.memset(host, 0xAB, host_bytes)
        matrices = memory(A, REALS[kind], batch, n, n)
        columns = matrices.swapaxes(1, 2).copy()
        self.while_solving()
        memory(W, REALS[kind], batch, n)[:] = self.factor * np.linalg.eigvalsh(columns)
        matrices[:] = np.nan
        memory(info, c_int, batch)[:] = [self.gave_up.get(i, 0) for i in range(batch)]
        self.batches.append(batch)
        self.sizes.append(device_bytes)
        self.streams.append(self.stream_of[solver])

    def check(self, solver, params, jobz, uplo, n, of_A, A, lda, of_W, W, compute):
        assert self.alive[solver] == "solver"
        assert self.alive[params] == "params"
        assert solver in self.stream_of
        assert jobz == 0, "CUSOLVER_EIG_MODE_NOVECTOR"
        assert uplo == 0, "CUBLAS_FILL_MODE_LOWER"
        assert of_A == of_W == compute
        assert lda == n > 0
        assert A
        assert W

    @staticmethod
    def bytes_for(n, batch):
        return 64 + 8 * n * batch, 16 + batch


def memory(address, kind, *shape):
    flat = (kind * int(np.prod(shape))).from_address(address)
    return np.ctypeslib.as_array(flat).reshape(shape)


@pytest.fixture
def library():
    library = StandIn()
    yield library
    assert not library.errors


@pytest.fixture
def solver(library):
    return cusolver.Cusolver(library)


@pytest.fixture
def of_torch():
    cusolver._of_torch.cache_clear()
    yield cusolver._of_torch
    cusolver._of_torch.cache_clear()


def symmetric(batch, n, dtype=torch.float64):
    A = torch.randn(batch, n, n, dtype=dtype)
    return A + A.mT


def assert_right(found, C, *, factor=10.0):
    exact = np.linalg.eigvalsh(C.double().cpu().numpy())
    assert found.dtype == C.dtype
    assert found.device == C.device
    error = np.abs(found.double().cpu().numpy() - exact).max(-1)
    eps = torch.finfo(C.dtype).eps
    assert (error <= factor * eps * np.abs(exact).max(-1)).all()
    assert (found.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (7, 1), (3, 5), (2, 70)])
def test_values_are_lapacks_and_the_input_stays(solver, library, batch, n, dtype):
    C = symmetric(batch, n, dtype)
    before = C.clone()
    assert_right(solver.eigenvalues(C, stream=0), C)
    assert torch.equal(C, before)
    assert library.batches == [batch]


def test_what_is_declared_is_what_the_header_says(solver, library):
    for name in HEADER.keys() - {"cusolverGetVersion"}:
        function = getattr(library, name)
        assert list(function.argtypes) == HEADER[name], name
        assert function.restype is c_int


def test_no_call_has_more_than_32768_matrices(solver, library):
    C = symmetric(40_000, 2)
    assert_right(solver.eigenvalues(C, stream=0), C)
    assert library.batches == [32_768, 40_000 - 32_768]


@pytest.mark.parametrize(("elements", "batches"), [(50, [3, 3, 1]), (15, [1] * 7)])
def test_no_call_has_more_elements_than_32_bits_count(
    solver, library, monkeypatch, elements, batches
):
    monkeypatch.setattr(cusolver, "ELEMENTS", elements)
    C = symmetric(7, 4)
    assert_right(solver.eigenvalues(C, stream=0), C)
    assert library.batches == batches


def test_the_batch_is_cut_until_the_workspace_is_below_its_cap(
    solver, library, monkeypatch
):
    cap, _ = library.bytes_for(4, 5)
    monkeypatch.setattr(cusolver, "WORKSPACE_BYTES", cap)
    C = symmetric(18, 4)
    assert_right(solver.eigenvalues(C, stream=0), C)
    assert library.batches == [4, 4, 4, 4, 2]
    assert max(library.sizes) <= cap


def test_one_matrix_may_take_more_than_the_cap(solver, library, monkeypatch):
    monkeypatch.setattr(cusolver, "WORKSPACE_BYTES", 0)
    C = symmetric(3, 4)
    assert_right(solver.eigenvalues(C, stream=0), C)
    assert library.batches == [1, 1, 1]


@pytest.mark.parametrize("name", [QUERY, SOLVE])
@pytest.mark.parametrize("status", [2, 3])  # ALLOC_FAILED, INVALID_VALUE
def test_a_batch_that_cusolver_finds_too_large_is_cut(solver, library, name, status):
    library.status = lambda called, batch: status if called == name and batch > 3 else 0
    C = symmetric(8, 4)
    assert_right(solver.eigenvalues(C, stream=0), C)
    assert library.batches == [2] * 4
    assert library.made == 2, "one solver with its parameters"


def test_a_batch_without_room_for_its_workspace_is_cut(solver, library, monkeypatch):
    limit = [library.bytes_for(4, 3)[0]]
    real = cusolver._scratch

    def scarce(n_bytes, device):
        if n_bytes > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(n_bytes, device)

    monkeypatch.setattr(cusolver, "_scratch", scarce)
    C = symmetric(12, 4)
    assert_right(solver.eigenvalues(C, stream=0), C)
    assert library.batches == [3] * 4
    limit[0] = 0
    with pytest.raises(Unavailable, match="one 4 x 4 matrix fails: CUDA out of memory"):
        solver.eigenvalues(C, stream=0)
    assert not library.alive


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("status", "text"),
    [(3, "INVALID_VALUE"), (7, "INTERNAL_ERROR"), (77, "status")],
)
def test_a_status_is_passed_on_and_nothing_stays_alive(
    solver, library, name, status, text
):
    library.status = lambda called, batch: status * (called == name)
    C = symmetric(3, 4)
    with pytest.raises(Unavailable, match=rf"{name} returned {text} \({status}\)"):
        solver.eigenvalues(C, stream=0)
    assert not library.alive
    library.status = lambda called, batch: 0
    assert_right(solver.eigenvalues(C, stream=0), C)


def test_what_did_not_converge_is_counted_once_a_chunk(solver, library, monkeypatch):
    monkeypatch.setattr(cusolver, "MATRICES", 3)
    library.gave_up = {1: 5, 2: 6}
    with pytest.raises(
        Unavailable, match="on 2 of 3 matrices of size 4: info is 5 for the first"
    ):
        solver.eigenvalues(symmetric(8, 4), stream=0)
    assert library.batches == [3]
    assert not library.alive


def test_wrong_values_are_found_out(solver, library):
    library.factor = 1 + 1e-9
    with pytest.raises(Unavailable, match="values of cuSOLVER have not the trace"):
        solver.eigenvalues(symmetric(8, 4), stream=0)


def test_an_older_library_is_named_with_its_version(library):
    library.version = 11604
    del library.cusolverDnXsyevBatched
    with pytest.raises(Unavailable, match=r"cuSOLVER 11\.6\.4 has no .*11\.7\.1"):
        cusolver.Cusolver(library)
    library.status = lambda name, batch: 1
    with pytest.raises(Unavailable, match="cuSOLVER of unknown version has no"):
        cusolver.Cusolver(library)


def test_every_call_goes_to_the_stream_it_is_given(solver, library):
    for stream in (0, 1 << 45, 3):
        solver.eigenvalues(symmetric(2, 3), stream=stream)
    assert library.streams == [None, 1 << 45, 3]
    assert library.made == 2, "one solver with its parameters for all calls"


def test_threads_at_once_have_a_handle_each_and_pass_it_on(solver, library):
    both = threading.Barrier(2)
    C = symmetric(4, 3)
    found = []

    def solve(stream):
        found.append(solver.eigenvalues(C, stream))

    def run(streams):
        threads = [threading.Thread(target=solve, args=(s,)) for s in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # Each waits in cuSOLVER for the other.
    library.while_solving = lambda: both.wait(timeout=10)
    run((11, 12))
    assert len(library.alive) == 4
    assert sorted(library.streams) == [11, 12]
    run((13, 14))
    assert len(library.alive) == 4
    for values in found:
        assert_right(values, C)


def test_devices_share_no_handle(solver):
    with solver._lent(0) as first:
        pass
    with solver._lent(1) as second:
        assert second.solver.value != first.solver.value
    with solver._lent(0) as third:
        assert third is first


def test_a_handle_is_not_lent_again_after_an_interrupt(solver, library):
    def interrupted():
        with solver._lent(0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not library.alive


MAPS = """\
7f00-7f01 r-xp 00000000 08:01 11                         /env/lib/libcusolverMg.so.12
7f01-7f02 r--p 00000000 08:01 12                         {first}
7f02-7f03 r-xp 00001000 08:01 12                         {first}
7f03-7f04 rw-p 00000000 00:00 0
7f04-7f05 rw-p 00000000 00:00 0                          [heap]
7f05-7f06 r-xp 00000000 08:01 13                         /env/lib/libcublas.so.13
"""


@pytest.mark.parametrize(
    "first", ["/my env/libcusolver.so.12", "/torch/lib/libcusolver-85bb9a1c.so.11"]
)
def test_the_mapped_library_comes_first_then_wheels_then_the_name(tmp_path, first):
    for folder in ("cusolver", "cu13", "cu12"):
        (tmp_path / "nvidia" / folder / "lib").mkdir(parents=True)
        for name in ("libcusolver.so.12", "libcusolverMg.so.12"):
            (tmp_path / "nvidia" / folder / "lib" / name).touch()
    found = cusolver._candidates(MAPS.format(first=first), tmp_path, "13.0")
    assert found == [
        first,
        str(tmp_path / "nvidia/cu13/lib/libcusolver.so.12"),
        str(tmp_path / "nvidia/cusolver/lib/libcusolver.so.12"),
        "libcusolver.so.12",
    ]


def test_without_maps_and_wheels_the_name_is_left(tmp_path):
    assert cusolver._candidates("", tmp_path, "12.8") == ["libcusolver.so.11"]


def test_maps_of_this_process_are_read_where_the_system_has_them(monkeypatch):
    if sys.platform == "linux":
        assert "torch" in cusolver._maps()

    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(cusolver.Path, "read_text", missing)
    assert cusolver._maps() == ""


def test_the_first_library_that_loads_is_taken(monkeypatch):
    def load(path):
        if path == "a":
            raise OSError("cannot open shared object file")
        return path

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert cusolver._opened(["a", "b", "c"]) == "b"
    with pytest.raises(Unavailable, match=r"is not found: tried a, a$"):
        cusolver._opened(["a", "a"])


class OnCuda(torch.Tensor):
    """A tensor of the host that says it is on a CUDA device."""

    is_cuda = True


@pytest.fixture
def cuda(monkeypatch):
    """Stand in for what torch.cuda is asked; the stream is known on the device only."""
    inside = []

    @contextlib.contextmanager
    def device(which):
        inside.append(which)
        yield
        inside.pop()

    def current_stream():
        assert inside == [torch.device("cpu")]
        return types.SimpleNamespace(cuda_stream=77)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "eye", lambda n, *, device: torch.diag(torch.ones(n)))


@pytest.mark.usefixtures("cuda")
def test_the_route_finds_the_library_once(of_torch, library, monkeypatch):
    opened = []

    def opens(candidates):
        opened.append(candidates)
        return library

    monkeypatch.setattr(cusolver, "_opened", opens)
    C = symmetric(3, 4)
    for _ in range(2):
        found = cusolver.eigenvalues(C.as_subclass(OnCuda))
        assert_right(found.as_subclass(torch.Tensor), C)
    assert library.streams == [77, 77]
    assert [paths[-1] for paths in opened] == ["libcusolver.so.12"]


@pytest.mark.usefixtures("cuda")
def test_why_there_is_no_library_is_found_once_too(of_torch, monkeypatch):
    opened = []

    def opens(candidates):
        opened.append(candidates)
        raise Unavailable("cuSOLVER is not found")

    monkeypatch.setattr(cusolver, "_opened", opens)
    for _ in range(2):
        with pytest.raises(Unavailable, match="cuSOLVER is not found"):
            cusolver.eigenvalues(symmetric(3, 4).as_subclass(OnCuda))
    assert len(opened) == 1


@pytest.mark.usefixtures("cuda")
def test_a_failure_of_torch_itself_is_not_kept(of_torch, library, monkeypatch):
    def failing(C):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cusolver, "_opened", lambda candidates: library)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigvalsh", failing)
        with pytest.raises(Unavailable, match="eigvalsh fails: CUDA out of memory"):
            of_torch()
    assert isinstance(of_torch(), cusolver.Cusolver)


@pytest.mark.usefixtures("cuda")
def test_a_torch_for_other_accelerators_is_told_apart(of_torch, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(Unavailable, match="not built for CUDA"):
        cusolver.eigenvalues(symmetric(3, 4).as_subclass(OnCuda))


@pytest.mark.parametrize("route", [cusolver, cupy])
def test_what_is_not_on_cuda_is_refused(route):
    with pytest.raises(Unavailable, match="serves CUDA devices, not cpu"):
        route.eigenvalues(symmetric(3, 4))


@pytest.fixture
def fake_cupy(monkeypatch):
    """Stand in for CuPy with numpy; what is entered is seen in ``entered``."""
    entered = []

    def entering(name):
        @contextlib.contextmanager
        def context(*args, **kwargs):
            entered.append((name, *args, *kwargs.items()))
            yield
            entered.pop()

        return context

    module = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(
        Device=entering("device"), ExternalStream=entering("stream")
    )
    module.from_dlpack = np.from_dlpack
    module.linalg = types.SimpleNamespace(eigvalsh=np.linalg.eigvalsh)
    module.entered = entered
    beside = types.ModuleType("cupyx")
    beside.errstate = entering("errstate")
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(sys.modules, "cupyx", beside)
    return module


@pytest.mark.usefixtures("cuda")
def test_cupy_reads_in_place_on_the_stream_of_torch(fake_cupy):
    C = symmetric(3, 4)
    seen, pool = [], []

    def eigvalsh(a):
        seen.extend([a.ctypes.data, *fake_cupy.entered])
        pool.append(np.linalg.eigvalsh(a))
        return pool[0]

    fake_cupy.linalg.eigvalsh = eigvalsh
    found = cupy.eigenvalues(C.as_subclass(OnCuda))
    assert_right(found.as_subclass(torch.Tensor), C)
    device, stream, errors = ("device", None), ("stream", 77, None), ("linalg", "raise")
    assert found.data_ptr() != pool[0].ctypes.data, "memory of torch"
    assert seen == [C.data_ptr(), device, stream, ("errstate", errors)]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("error", [RuntimeError, MemoryError, np.linalg.LinAlgError])
def test_what_cupy_raises_is_passed_on(fake_cupy, error):
    def failing(a):
        raise error("why")

    fake_cupy.linalg.eigvalsh = failing
    with pytest.raises(Unavailable, match=r"cupy\.linalg\.eigvalsh fails: why"):
        cupy.eigenvalues(symmetric(3, 4).as_subclass(OnCuda))


@pytest.mark.usefixtures("cuda")
def test_wrong_values_of_cupy_are_found_out(fake_cupy):
    fake_cupy.linalg.eigvalsh = lambda a: np.linalg.eigvalsh(a)[::-1].copy()
    with pytest.raises(Unavailable, match="values of CuPy have not the trace"):
        cupy.eigenvalues(symmetric(3, 4).as_subclass(OnCuda))


@pytest.mark.parametrize("missing", ["cupy", "cupyx"])
@pytest.mark.usefixtures("cuda", "fake_cupy")
def test_without_cupy_the_route_is_unavailable(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(Unavailable, match="CuPy cannot be imported"):
        cupy.eigenvalues(symmetric(3, 4).as_subclass(OnCuda))


def of_spectrum(values, batch):
    Q, _ = torch.linalg.qr(torch.randn(batch, len(values), len(values)).double())
    C = Q * values @ Q.mT
    return (C + C.mT) / 2


FAMILIES = {
    "indefinite": lambda: symmetric(16, 100),
    "rank-deficient": lambda: of_spectrum(torch.arange(96).sub(90).clamp(min=0), 8),
    "clustered": lambda: of_spectrum(1 + 1e-6 * torch.arange(64).double(), 8),
    "graded": lambda: of_spectrum(10 ** -torch.arange(40).double().div(2), 8),
    "zero": lambda: torch.zeros(3, 50, 50).double(),
    "tiny": lambda: 1e-25 * symmetric(8, 33),
    "huge": lambda: 1e30 * symmetric(8, 33),
    "n = 1": lambda: symmetric(5, 1),
    "one matrix": lambda: symmetric(1, 300),
    "40,000 of 8 x 8": lambda: symmetric(40_000, 8),
}


@pytest.fixture(params=["cusolver", "cupy"])
def route(request):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cupy":
        pytest.importorskip("cupy")
    return {"cusolver": cusolver, "cupy": cupy}[request.param].eigenvalues


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_device_values_are_lapacks(route, family, dtype):
    C = FAMILIES[family]().to("cuda", dtype)
    assert_right(route(C.clone()), C, factor=max(10, C.shape[-1]))


@pytest.mark.gpu
def test_on_a_device_the_current_stream_is_waited_for_and_used(route):
    C = symmetric(64, 64).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        # Not there yet when the route is called.
        late = torch.zeros_like(C).copy_(C)
        found = route(late) * 1
    stream.synchronize()
    assert_right(found, C, factor=64)


@pytest.mark.gpu
def test_on_a_device_threads_do_not_disturb_each_other(route):
    batches = [symmetric(200, n).cuda() for n in (17, 40)]
    torch.cuda.synchronize()
    found = [[], []]

    def solve(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                found[i].append(route(batches[i].clone()))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=solve, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for C, results in zip(batches, found, strict=True):
        assert len(results) == 10
        for values in results:
            assert_right(values, C, factor=64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_device_a_small_workspace_cuts_the_batch(monkeypatch):
    monkeypatch.setattr(cusolver, "WORKSPACE_BYTES", 1 << 20)
    C = symmetric(300, 50).cuda()
    assert_right(cusolver.eigenvalues(C), C, factor=50)
