from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import repscope as rs
from repscope.errors import MetricError, NonFiniteError, NotEnoughSamples, UsageError
from repscope.metrics.similarity import SIMILARITY_METRICS

METRICS = pytest.mark.parametrize(
    "metric", SIMILARITY_METRICS.values(), ids=SIMILARITY_METRICS
)
SPACES = pytest.mark.parametrize("space", ["samples", "features"])


def close(found, expected, rtol=1e-9, atol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def related(n=60, d=7, e=5, *, lead=()):
    """Return two noisy views of the same samples, far from the origin."""
    X = torch.randn(*lead, n, d, dtype=torch.float64)
    Y = X @ torch.randn(d, e, dtype=torch.float64) + torch.randn(*lead, n, e)
    return X * torch.logspace(0, -1, d) + 3, Y - 1


def rotation(d, *, generator=None):
    draw = torch.randn(d, d, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(draw)[0]


def orthonormal(n, k):
    """Return ``(n, k)`` orthonormal columns that are already centred."""
    draw = torch.randn(n, k, dtype=torch.float64)
    return torch.linalg.qr(draw - draw.mean(0))[0]


def angles(X, Y, k, space="samples"):
    return rs.principal_angles(X, Y, k=k, space=space, same_run=space == "features")


def overlap(X, Y, k, space="samples"):
    return rs.subspace_overlap(X, Y, k=k, space=space, same_run=space == "features")


# -- against independent twins -----------------------------------------------
SHAPES = pytest.mark.parametrize(
    "shape", [(60, 7, 5), (30, 3, 90), (12, 40, 25), (4, 2, 2), (50, 1, 6)], ids=str
)


@SHAPES
def test_cka_is_hsic_over_hsics_on_either_side(shape):
    X, Y = related(*shape)
    close(rs.linear_cka(X, Y), oracles.cka(X, Y))
    close(rs.linear_cka(X, Y, debiased=True), oracles.debiased_cka([(X, Y)]))


@SHAPES
def test_procrustes_is_scipys(shape):
    X, Y = related(*shape)
    close(rs.procrustes_distance(X, Y), oracles.procrustes(X, Y), atol=1e-9)


@SPACES
@pytest.mark.parametrize("k", [1, 2, 3])
def test_angles_are_scipys_between_sklearns_components(k, space):
    X, Y = related(60, 7, 7)
    expected = oracles.principal_angles(X, Y, k, space=space)
    close(angles(X, Y, k, space), expected)
    found = overlap(X, Y, k, space)
    close(found.overlap, np.mean(np.cos(expected) ** 2))


def test_angles_without_k_are_those_of_all_features():
    X, Y = related(60, 7, 4)
    found = rs.principal_angles(X, Y)
    expected = np.sort(
        oracles.scipy.linalg.subspace_angles(oracles.centred(X), oracles.centred(Y))
    )
    close(found, expected)
    close(rs.principal_angles(Y, X), expected)


# -- closed forms ------------------------------------------------------------
@pytest.mark.parametrize(("p", "q", "m"), [(3, 3, 3), (4, 2, 2), (3, 5, 1), (2, 2, 0)])
def test_isotropic_features_that_share_m_directions(p, q, m):
    """XX' and YY' are projections: every number counts shared directions."""
    basis = orthonormal(40, 8)
    X = basis[:, :p] @ rotation(p) * 5 + 2
    Y = basis[:, p - m : p - m + q] @ rotation(q) - 7
    share = m / math.sqrt(p * q)
    close(rs.linear_cka(X, Y), share)
    close(rs.procrustes_distance(X, Y), math.sqrt(2 - 2 * share))
    least = min(p, q)
    close(rs.principal_angles(X, Y), [0.0] * m + [math.pi / 2] * (least - m))
    if p == q:
        close(rs.subspace_overlap(X, Y, k=p).overlap, m / p)


@pytest.mark.parametrize("angle", [1e-13, 1e-10, 1e-5, 0.3, 1.5, math.pi / 2 - 1e-10])
def test_planted_angles_keep_their_digits(angle):
    basis = orthonormal(30, 4)
    turned = basis[:, :2] * math.cos(angle) + basis[:, 2:] * math.sin(angle)
    X, Y = basis[:, :2] @ rotation(2), turned @ rotation(2)
    close(rs.principal_angles(X, Y), [angle] * 2, atol=2e-15)
    found = rs.subspace_overlap(X, Y, k=2).overlap
    close(found, math.cos(angle) ** 2)


def test_the_same_function_with_rescaled_units():
    """relu(x W1) W2 = relu(x W1 c) W2 / c: the same span, other similarities."""
    X = torch.relu(torch.randn(50, 6, dtype=torch.float64))
    uneven = X * torch.logspace(-2, 2, 6)
    close(rs.principal_angles(X, uneven), [0.0] * 6)
    assert rs.linear_cka(X, uneven) < 0.9
    assert rs.procrustes_distance(X, uneven) > 0.1
    for metric in SIMILARITY_METRICS.values():
        close(metric(X, X * 30), metric(X, X), atol=1e-12)


def test_wide_noise_is_alike_until_the_bias_is_taken_out():
    """E |X'Y|^2 / |X'X| |Y'Y| tends to 1 with the width, and HSIC_1 to 0."""
    X, Y = torch.randn(2, 20, 30, 2000, dtype=torch.float64)
    assert rs.linear_cka(X, Y).mean() > 0.98
    assert rs.linear_cka(X, Y, debiased=True).mean().abs() < 0.03


def test_samples_that_are_equally_far_apart_say_nothing_debiased():
    Y = torch.randn(8, 3)
    turned = torch.eye(8, dtype=torch.float64) @ rotation(8) + 5
    for simplex in (torch.eye(8), turned, turned.float()):
        close(rs.linear_cka(simplex, simplex), 1.0)
        assert rs.linear_cka(simplex, Y, debiased=True).isnan()
        assert rs.linear_cka(Y, simplex, debiased=True).isnan()
    nearly = turned + 1e-5 * torch.randn(8, 8)
    assert rs.linear_cka(nearly, Y, debiased=True).abs() <= 1
    for n in range(4, 30):
        turned = torch.eye(n, dtype=torch.float64) @ rotation(n)
        assert rs.linear_cka(turned, torch.randn(n, 3), debiased=True).isnan()


@SPACES
def test_random_subspaces_overlap_by_chance(space):
    X, Y = torch.randn(2, 400, 13, 12, dtype=torch.float64)
    found = overlap(X, Y, 4, space)
    assert found.dimension == 12
    assert found.chance == pytest.approx(4 / 12)
    assert found.overlap.shape == (400,)
    # Standard error 0.006; without the centring, k / n would be 0.308.
    assert found.overlap.mean().item() == pytest.approx(found.chance, abs=0.015)


# -- laws --------------------------------------------------------------------
@METRICS
@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(5, 20),
    d=st.integers(1, 25),
    e=st.integers(1, 25),
    scale=st.floats(-20, 20),
)
def test_laws(metric, seed, n, d, e, scale):
    torch.manual_seed(seed)
    X, Y = related(n, d, e)
    found = metric(X, Y)
    assert found.ndim == 0
    assert found.dtype == torch.float64
    same = {"rtol": 1e-7, "atol": 1e-8}
    order = torch.randperm(n)
    close(metric(X[order], Y[order]), found, **same)
    close(metric(Y, X), found, **same)
    close(metric(X[:, torch.randperm(d)], Y), found, **same)
    close(metric(X @ rotation(d), Y @ rotation(e)), found, **same)
    close(metric(X + torch.randn(d), Y - 100), found, **same)
    close(metric(X * -(2.0**scale), Y * 1e3), found, **same)
    close(metric(torch.cat([X, X], 1), Y), found, **same)
    close(metric(torch.nn.functional.pad(X, (0, 3)), Y), found, **same)
    itself = 0.0 if metric is rs.procrustes_distance else 1.0
    close(metric(X, X @ rotation(d) * 3 + 1), itself, atol=1e-7)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16), widths=st.tuples(*[st.integers(1, 8)] * 3))
def test_procrustes_is_a_metric_and_so_is_its_angle(seed, widths):
    torch.manual_seed(seed)
    X, Y, Z = (torch.randn(9, d, dtype=torch.float64) for d in widths)
    xy, yz, xz = (rs.procrustes_distance(*pair) for pair in ((X, Y), (Y, Z), (X, Z)))
    assert xz <= xy + yz + 1e-9
    xy, yz, xz = ((1 - d.square() / 2).acos() for d in (xy, yz, xz))
    assert xz <= xy + yz + 1e-9


@pytest.mark.parametrize("metric", [rs.linear_cka, rs.procrustes_distance])
def test_every_sample_twice_changes_nothing(metric):
    X, Y = related()
    close(metric(X.repeat(3, 1), Y.repeat(3, 1)), metric(X, Y))
    close(angles(X.repeat(3, 1), Y.repeat(3, 1), 2), angles(X, Y, 2))


@SPACES
def test_laws_of_angles(space):
    X, Y = related(60, 7, 7)
    found = angles(X, Y, 3, space)
    assert (found.diff() >= 0).all()
    close(angles(Y, X, 3, space), found)
    close(angles(X * -4 + 9, Y / 7 - 3, 3, space), found)
    order = torch.randperm(60)
    close(angles(X[order], Y[order], 3, space), found)
    turn = rotation(7)
    close(angles(X @ turn, Y @ turn, 3, space), found)
    if space == "samples":
        close(angles(X @ turn, Y, 3, space), found)
    else:
        close(angles(X[order], Y[:40], 3, space), angles(X, Y[:40], 3, space))
        assert (angles(X @ turn, Y, 3, space) - found).abs().max() > 0.1
    close(angles(X, X, 3, space), [0.0] * 3)
    close(overlap(X, X, 3, space).overlap, 1.0)


@METRICS
def test_batches_and_broadcasting(metric):
    X, Y = related(20, 4, 6, lead=(3, 2))
    found = metric(X, Y)
    rows = [
        [metric(x, y) for x, y in zip(*row, strict=True)]
        for row in zip(X, Y, strict=True)
    ]
    close(found, torch.stack([torch.stack(row) for row in rows]))
    close(metric(X, Y[0]), torch.stack([metric(x, Y[0]) for x in X]))
    # All pairs of layers at once.
    close(metric(X[:, 0, None], Y[None, :, 1])[2, 1], metric(X[2, 0], Y[1, 1]))


def test_batches_of_angles():
    X, Y = related(20, 4, 6, lead=(3,))
    found = angles(X, Y, 2)
    close(found, torch.stack([angles(x, y, 2) for x, y in zip(X, Y, strict=True)]))
    close(angles(X, Y[1], 2)[2], angles(X[2], Y[1], 2))
    assert overlap(X, Y, 2).overlap.shape == (3,)


# -- numerics ----------------------------------------------------------------
READINGS = SIMILARITY_METRICS | {
    "minibatch_cka": lambda X, Y: rs.MinibatchCKA().update(X, Y).value(),
    "principal_angles": lambda X, Y: angles(X, Y, 2),
    "subspace_overlap": lambda X, Y: overlap(X, Y, 2).overlap,
}
CALLS = pytest.mark.parametrize("call", READINGS.values(), ids=READINGS)


@CALLS
def test_input_dtypes_scales_and_means(call):
    X, Y = related(200, 6, 5)
    found = call(X, Y)
    close(call(X.float(), Y.float()), found, rtol=1e-5, atol=1e-6)
    close(call(X.numpy(), Y.tolist()), found)
    close(call(X.float() * 1e30, Y.float() * 1e-30), found, rtol=1e-5, atol=1e-6)
    close(call(X * 1e200, Y * 1e-200), found)
    close(call(X + 1e6, Y - 1e6), found, rtol=1e-8)
    whole = (X * 20).to(torch.int8)
    close(call(whole, Y), call(whole.double(), Y))
    half = X.half()
    close(call(half, Y), call(half.double(), Y))


@CALLS
def test_input_is_left_alone_and_needs_no_gradient(call):
    X, Y = related()
    X = torch.stack([X, X], -1)[..., 0].requires_grad_()
    before = X.detach().clone()
    assert not call(X, Y).requires_grad
    assert torch.equal(X.detach(), before)


@CALLS
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees(call):
    X, Y = related()
    found = call(X.cuda(), Y.cuda())
    assert found.is_cuda
    close(found.cpu(), call(X, Y))


def test_self_distance_is_not_the_root_of_rounding():
    for d in range(1, 30):
        X, _ = related(50, d)
        assert rs.procrustes_distance(X, X) < 1e-12
        assert rs.procrustes_distance(X, X @ rotation(d) * 7 - 2) < 1e-12


def test_rounding_leaves_no_range():
    for d in range(1, 30):
        X, _ = related(80, d)
        for debiased in (False, True):
            assert rs.linear_cka(X, X @ rotation(d) * 7 - 2, debiased=debiased) <= 1
        apart = orthonormal(80, 2 * d)
        assert rs.procrustes_distance(apart[:, :d], apart[:, d:]) <= 2**0.5
        assert overlap(X, X @ rotation(d), d).overlap <= 1


def test_neither_many_samples_nor_many_features_cost_their_square():
    """Squared, they would not fit into memory."""
    X, Y = related(10, 3, 2)
    stretched = X @ rotation(3) @ torch.eye(3, 200_000, dtype=torch.float64)
    for metric in SIMILARITY_METRICS.values():
        close(metric(stretched, Y), metric(X, Y))
    close(angles(stretched, Y, 2), angles(X, Y, 2))
    many = X.repeat(20_000, 1), Y.repeat(20_000, 1)
    for metric in (rs.linear_cka, rs.procrustes_distance):
        close(metric(*many), metric(X, Y))
    close(angles(*many, 2), angles(X, Y, 2))


# -- degenerate input --------------------------------------------------------
@METRICS
@pytest.mark.parametrize("value", [0.0, 0.1, 1e30, -7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_have_no_similarity(metric, value, dtype):
    constant = torch.full((20, 3), value, dtype=dtype)
    X, _ = related(20)
    assert metric(X, constant).isnan()
    assert metric(constant, X).isnan()
    assert metric(constant, constant).isnan()
    batch = metric(torch.stack([X[:, :3], constant.double()]), X)
    assert batch.isnan().tolist() == [False, True]


def test_rounding_of_the_dtype_is_no_variance():
    wobble = torch.tensor(0.1).nextafter(torch.arange(20.0) % 2)[:, None].repeat(1, 3)
    assert wobble.unique().numel() == 2
    X, _ = related(20)
    assert rs.linear_cka(X, wobble).isnan()
    assert not rs.linear_cka(X, wobble.double()).isnan()
    # Beside a live feature it is left out as well.
    both = torch.cat([X[:, :1].float(), wobble * 1e8], 1)
    close(rs.linear_cka(both, X), rs.linear_cka(both[:, :1], X))


def test_a_dead_unit_is_named_for_angles_and_harmless_elsewhere():
    X, Y = related()
    dead = X.clone()
    dead[:, 2] = 0.1
    doubled = torch.cat([X, X[:, :2] @ torch.rand(2, 1).double()], 1)
    for lame, rank in ((dead, 6), (doubled, 7)):
        with pytest.raises(MetricError, match=rf"X has rank {rank} .* use k <= {rank}"):
            rs.principal_angles(lame, Y)
        assert rs.principal_angles(lame, Y, k=2).isfinite().all()
        assert rs.procrustes_distance(lame, Y).isfinite()
    with pytest.raises(MetricError, match="Y has rank 5 and no 6 leading"):
        rs.subspace_overlap(X, Y, k=6)
    with pytest.raises(MetricError, match="Y is constant"):
        rs.subspace_overlap(X, torch.ones(60, 5), k=1)
    # In float32 the dependent feature differs from its sum by rounding only.
    with pytest.raises(MetricError, match="X has rank 7"):
        rs.principal_angles(doubled.float(), Y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_rounding_of_the_dtype_adds_no_rank(dtype, mean):
    """Features of rank 3 whose rounding fills the other 9 directions."""
    sizes = torch.tensor([16.0, 8.0, 4.0])
    exact = orthonormal(200, 3) * sizes @ rotation(12)[:3] + mean
    X = exact.to(dtype)
    filled = torch.from_numpy(oracles.centred(X.double()))
    assert torch.linalg.matrix_rank(filled) == 12
    with pytest.raises(MetricError, match="X has rank 3 and no 4"):
        rs.principal_angles(X, exact, k=4)
    assert rs.principal_angles(X, exact, k=3).max() < 20 * torch.finfo(dtype).eps


@SPACES
def test_a_subspace_that_splits_equal_variances_is_undetermined(space):
    tied = orthonormal(40, 6) * torch.tensor([3.0, 2, 2, 1, 1, 0.5])
    X, _ = related(40, 6)
    assert angles(tied, X, 1, space).shape == (1,)
    assert angles(tied, X, 3, space).shape == (3,)
    with pytest.raises(MetricError, match="values 2 and 3 of X are equal"):
        angles(tied, X, 2, space)


def test_subspaces_that_fill_the_space_are_refused():
    X, Y = torch.randn(2, 20, 10)
    with pytest.raises(
        NotEnoughSamples,
        match=r"10 and 10 dimensions among 20 samples \(19 .* at least 1 directions "
        r".* at least 21 samples, or k <= 9",
    ):
        rs.principal_angles(X, Y)
    assert rs.principal_angles(X, Y, k=9).shape == (9,)
    # And it would be true: one angle is 0, whatever they hold.
    x, y = oracles.centred(X), oracles.centred(Y)
    assert oracles.scipy.linalg.subspace_angles(x, y).min() < 1e-6
    with pytest.raises(MetricError, match=r"among 10 features share .* 2 .*k <= 5"):
        rs.subspace_overlap(X, Y, k=6, space="features", same_run=True)
    assert rs.principal_angles(X, Y[:, :9]).shape == (9,)


# -- minibatches -------------------------------------------------------------
def test_minibatches_sum_before_they_divide():
    X, Y = related(47, 30, 40)
    pairs = list(zip(X.split(10), Y.split(10), strict=True))
    cka = rs.MinibatchCKA()
    for x, y in pairs:
        assert cka.update(x, y) is cka
    close(cka.value(), oracles.debiased_cka(pairs))
    mean = torch.stack([rs.linear_cka(x, y, debiased=True) for x, y in pairs]).mean()
    assert (cka.value() - mean).abs() > 1e-3
    close(rs.MinibatchCKA().update(X, Y).value(), rs.linear_cka(X, Y, debiased=True))


def test_minibatches_tend_to_the_whole():
    X, Y = related(3000, 6, 6)
    cka = rs.MinibatchCKA()
    for x, y in zip(X.split(30), Y.split(30), strict=True):
        cka.update(x, y)
    whole = rs.linear_cka(X, Y, debiased=True)
    assert cka.value().item() == pytest.approx(whole.item(), abs=0.01)


def test_minibatches_of_unequal_scale_share_one():
    X, Y = related(30, 4, 4)
    last = 20
    for scale in (1e150, 1e-150):
        cka = rs.MinibatchCKA().update(X[:last] * scale, Y[:last]).update(X, Y)
        big = (X[:last], Y[:last]) if scale > 1 else (X, Y)
        one = oracles.hsic_1(big[0], big[0]) * len(big[0])
        cross = oracles.hsic_1(*big) * len(big[0])
        other = 20 * oracles.hsic_1(Y[:last], Y[:last]) + 30 * oracles.hsic_1(Y, Y)
        close(cka.value(), cross / math.sqrt(one * other))


def test_minibatches_of_which_one_is_large_in_each_representation():
    (X, Y), (V, W) = related(30, 4, 4), related(30, 4, 4)
    pairs = [(X * 16, Y), (V, W * 32)]
    cka = rs.MinibatchCKA()
    for x, y in pairs:
        cka.update(x, y)
    close(cka.value(), oracles.debiased_cka(pairs))


def test_a_constant_batch_adds_nothing_and_nothing_else_is_nan():
    X, Y = related(20)
    constant = torch.full_like(X, 3.0)
    cka = rs.MinibatchCKA().update(constant, Y)
    assert cka.value().isnan()
    tiny = X * 1e-250
    close(
        cka.update(tiny, Y).update(tiny * 0, Y).value(),
        rs.MinibatchCKA().update(X, Y).update(constant, Y).value(),
    )


def test_minibatches_that_do_not_fit_are_named():
    cka = rs.MinibatchCKA()
    with pytest.raises(NotEnoughSamples, match="no batch; call update"):
        cka.value()
    with pytest.raises(
        NotEnoughSamples, match=r"at least 4 samples, got 3.*last batch"
    ):
        cka.update(torch.randn(3, 2), torch.randn(3, 2))
    cka.update(torch.randn(8, 2), torch.randn(8, 5))
    with pytest.raises(
        MetricError, match=r"had \(2, 5\) features .* this one \(2, 4\)"
    ):
        cka.update(torch.randn(8, 2), torch.randn(8, 4))


# -- bad input ---------------------------------------------------------------
@CALLS
@pytest.mark.parametrize(
    ("X", "Y", "error", "text"),
    [
        (torch.randn(8, 2), torch.randn(9, 2), MetricError, "same samples .* 8 and 9"),
        (
            torch.randn(8),
            torch.randn(8, 2),
            MetricError,
            r"X must have shape .* \(8,\)",
        ),
        (torch.randn(8, 2), torch.randn(8, 0), MetricError, "Y is empty"),
        (torch.randn(1, 2), torch.randn(1, 2), NotEnoughSamples, "at least 2 samples"),
        (torch.randn(8, 2), [[math.nan]] * 8, NonFiniteError, "Y has 8 non-finite"),
        (torch.randn(8, 2) * 1j, torch.randn(8, 2), MetricError, "dense real tensor"),
        (
            torch.randn(3, 8, 2),
            torch.randn(2, 8, 2),
            MetricError,
            r"do not broadcast: shapes \(3, 8, 2\) and \(2, 8, 2\)",
        ),
    ],
)
def test_bad_input_is_named(call, X, Y, error, text):
    with pytest.raises(error, match=text):
        call(X, Y)


@pytest.mark.parametrize("read", [rs.principal_angles, rs.subspace_overlap])
def test_directions_of_different_networks_are_refused(read):
    X, Y = related(60, 7, 7)
    with pytest.raises(
        UsageError, match=r"units of different networks .*same_run=True"
    ):
        read(X, Y, k=2, space="features")
    with pytest.raises(MetricError, match="same units in X and Y, got 7 and 5"):
        read(X, Y[:, :5], k=2, space="features", same_run=True)
    with pytest.raises(MetricError, match="do not broadcast"):
        read(X.repeat(2, 1, 1), Y.repeat(3, 1, 1), k=2, space="features", same_run=True)
    with pytest.raises(UsageError, match="space='sample' is not one of"):
        read(X, Y, k=2, space="sample")
    with pytest.raises(UsageError, match="k must be at least 1, got 0"):
        read(X, Y, k=0)


# -- beside the seeds --------------------------------------------------------
def gap(a, b):
    return torch.tensor(abs(a - b))


def test_between_and_within_are_means_over_pairs_then_groups():
    runs = {"sgd": [0.0, 1.0], "adam": (10.0, 12.0, 17.0), "shampoo": [1.0, 5.0]}
    found = rs.between_within(runs, gap)
    assert found.groups == ("sgd", "adam", "shampoo")
    within = [1.0, (2 + 5 + 7) / 3, 4.0]
    assert found.means.diagonal().tolist() == pytest.approx(within)
    sgd_adam = (10 + 12 + 17 + 9 + 11 + 16) / 6
    sgd_shampoo = (1 + 5 + 0 + 4) / 4
    adam_shampoo = (9 + 5 + 11 + 7 + 16 + 12) / 6
    assert found.means[0].tolist() == pytest.approx([1.0, sgd_adam, sgd_shampoo])
    assert torch.equal(found.means, found.means.T)
    assert found.n_pairs.tolist() == [[1, 6, 4], [6, 3, 6], [4, 6, 1]]
    assert found.within == pytest.approx(sum(within) / 3)
    assert found.between == pytest.approx((sgd_adam + sgd_shampoo + adam_shampoo) / 3)
    assert found.ratio == pytest.approx(found.between / found.within)
    frame = found.to_frame()
    assert frame.columns.tolist() == ["group_a", "group_b", "mean", "n_pairs"]
    assert frame["group_b"].tolist() == [
        "sgd", "adam", "shampoo", "adam", "shampoo", "shampoo"
    ]  # fmt: skip
    assert frame["mean"][1] == pytest.approx(sgd_adam)
    assert frame["n_pairs"].tolist() == [1, 6, 4, 3, 6, 1]


def test_members_of_one_seed_are_not_compared_across_groups():
    named = {"a": {0: 0.0, 1: 10.0}, "b": {0: 1.0, 1: 14.0, 2: 3.0}}
    found = rs.between_within(named, gap)
    # Not 0-0 and 1-1: they share their initialisation.
    assert found.means[0, 1] == pytest.approx((14 + 3 + 9 + 7) / 4)
    assert found.n_pairs.tolist() == [[1, 4], [4, 3]]
    mixed = {"a": named["a"], "b": list(named["b"].values())}
    assert rs.between_within(mixed, gap).n_pairs[0, 1] == 6


def test_groups_that_do_not_differ_have_a_ratio_of_one():
    """Two optimizers that find the same networks, seed by seed, do not differ."""
    base = torch.randn(40, 6)
    nets = {seed: base + torch.randn(40, 6) for seed in range(5)}
    found = rs.between_within({"a": nets, "b": nets}, rs.procrustes_distance)
    assert found.ratio == pytest.approx(1.0)
    other = {seed: torch.randn(40, 6) for seed in range(5)}
    apart = rs.between_within(
        {"a": nets, "b": other}, lambda a, b: 1 - rs.linear_cka(a, b)
    )
    assert apart.means[0, 0] < apart.means[0, 1]


def test_ratios_without_a_spread():
    assert rs.between_within({"a": [1, 1], "b": [3, 3]}, gap).ratio == math.inf
    assert math.isnan(rs.between_within({"a": [1, 1], "b": [1, 1]}, gap).ratio)


@pytest.mark.parametrize(
    ("groups", "distance", "error", "text"),
    [
        ({"a": [1, 2]}, gap, UsageError, r"got \['a'\]; give at least 2"),
        ({"a": [1, 2], "b": [1]}, gap, NotEnoughSamples, "group 'b' has 1 members"),
        ({"a": {}, "b": [1, 2]}, gap, NotEnoughSamples, "group 'a' has 0 members"),
        (
            {"a": [1, 2], "b": [1, 2]},
            lambda a, b: [a, b],
            MetricError,
            r"'a'\[0\] and 'a'\[1\] must be one number, got shape \(2,\)",
        ),
        (
            {"a": [1, 2], "b": [1, 2]},
            lambda a, b: math.nan,
            NonFiniteError,
            r"distance of 'a'\[0\] and 'a'\[1\] is nan; leave out",
        ),
    ],
)
def test_groups_that_make_no_comparison_are_named(groups, distance, error, text):
    with pytest.raises(error, match=text):
        rs.between_within(groups, distance)


def test_overlaps_have_one_row_per_pair():
    X, Y = related(20, 4, 4, lead=(3,))
    frame = rs.subspace_overlap(X, Y, k=2).to_frame()
    assert frame.columns.tolist() == ["overlap", "chance", "k", "space", "dimension"]
    assert frame["chance"].tolist() == [2 / 19] * 3
    assert rs.subspace_overlap(X[0], Y[0], k=2).to_frame().shape == (1, 5)
