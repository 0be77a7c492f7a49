"""The kernels in Triton's interpreter, compiled without a GPU, and on one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matrices import FAMILIES, assert_eigenvalues, of_all_families, symmetric

from repscope.linalg.routes import tridiagonal, triton
from repscope.linalg.routes.invariants import invariants_hold

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# The interpreter takes seconds for each of the larger ones.
CASES = {
    **{f"float32 {n}": (n, 3) for n in (1, 2, 5, 33)},
    **{f"float64 {n}": (n, 3) for n in (1, 2, 5)},
    **{f"float32 {n}": (n, 18) for n in (64, 100, 128)},
    **{f"float64 {n}": (n, 18) for n in (33, 128)},
}


def matrices_of(case):
    """Return one matrix of each family, or of every sixth."""
    n, every = CASES[case]
    return of_all_families(n, DTYPES[case.split()[0]])[::every].contiguous()


def families(case):
    _, every = CASES[case]
    return list(FAMILIES)[:: every // 3]


def run(what, folder, **environment):
    script = Path(__file__).with_name("in_triton.py")
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", script, what, folder],
        env=os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Return the batches, what came out of them, and what out of eigvalsh."""
    folder = tmp_path_factory.mktemp("triton")
    torch.manual_seed(0)
    matrices = {case: matrices_of(case) for case in CASES}
    torch.save(matrices, folder / "matrices.pt")
    run("run", folder, TRITON_INTERPRET="1")
    return matrices, *torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    run("compile", folder, TRITON_INTERPRET="0")
    return torch.load(folder / "compiled.pt")


@pytest.mark.kernels
@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_find_the_values_of_lapack(interpreted, case):
    matrices, found, _ = interpreted
    *_, values = found[case]
    assert_eigenvalues(values, matrices[case])
    assert invariants_hold(matrices[case], values)


@pytest.mark.kernels
@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_go_through_the_same_numbers_as_their_twin(
    interpreted, case
):
    matrices, found, _ = interpreted
    C = matrices[case]
    scale, d, e, values = found[case]
    own_scale, own_d, own_e = tridiagonal.tridiagonalise(C)
    assert torch.equal(scale, own_scale)
    bisected = tridiagonal.bisect(d, e) * scale[:, None]
    eps = torch.finfo(C.dtype).eps
    top = values.abs().amax(-1, keepdim=True)
    assert ((bisected - values).abs() <= 2 * eps * top).all()
    apart = torch.maximum((d - own_d).abs(), e.abs().sub(own_e.abs()).abs()).amax(-1)
    # Equal eigenvalues leave open which tridiagonal matrix it is.
    several = "rank-deficient", "ones"
    for name, gap in zip(families(case), (apart / eps).tolist(), strict=True):
        assert gap <= 2e4 or name in several, name


@pytest.mark.kernels
@needs_triton
def test_eigvalsh_takes_the_interpreted_kernels(interpreted):
    *_, public = interpreted
    assert public.tolist() == pytest.approx([3.0, 1.0])


@pytest.mark.kernels
@needs_triton
@pytest.mark.parametrize("n", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("kernel", ["tridiagonalise", "bisect"])
def test_kernels_compile_and_stay_in_registers(compiled, kernel, dtype, n):
    ptx, resources = compiled[f"{kernel} {dtype} {n}"]
    assert f".entry {kernel}(" in ptx
    # What a thread keeps in memory, in bytes; a column of the tile would be 512.
    stack, local = re.search(r" STACK:(\d+) .* LOCAL:(\d+) ", resources).groups()
    assert int(stack) + int(local) <= 256, resources


@pytest.mark.kernels
@needs_triton
def test_importing_the_route_does_not_import_triton():
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import repscope.linalg."
        "choice; print(before, 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    before, after = done.stdout.split()
    assert before == after


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 5, 33, 64, 100, 128])
def test_on_a_device_values_are_lapacks(n, dtype):
    C = of_all_families(n, DTYPES[dtype])
    assert_eigenvalues(triton.eigenvalues(C.cuda()).cpu(), C)


@pytest.mark.gpu
@needs_triton
@needs_gpu
def test_on_a_device_the_current_stream_is_waited_for_and_used():
    C = symmetric(64).repeat(50, 1, 1)
    on_device, stream = C.cuda(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        # Not there yet when the route is called.
        late = torch.zeros_like(on_device).copy_(on_device)
        found = triton.eigenvalues(late) * 1
    stream.synchronize()
    assert_eigenvalues(found.cpu(), C)
