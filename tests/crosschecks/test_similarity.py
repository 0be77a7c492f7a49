"""The same features through published packages: agreement, and known disagreements.

pip install --no-deps ckatorch safetensors pytorch-cka torch-cka
pip install rsatoolbox
"""

from __future__ import annotations

import pytest
import torch

import repscope as rs

pytestmark = pytest.mark.crosschecks


@pytest.fixture(params=[(60, 20, 30), (40, 8, 70), (12, 30, 50)], ids=str)
def pair(request):
    n, d, e = request.param
    X = torch.randn(n, d, dtype=torch.float64)
    noise = torch.randn(n, e, dtype=torch.float64)
    return X + 2, X @ torch.randn(d, e, dtype=torch.float64) + 3 * noise - 1


def unrelated():
    return torch.randn(2, 30, 200, dtype=torch.float64)


def minibatches(X, Y, size):
    cka = rs.MinibatchCKA()
    for x, y in zip(X.split(size), Y.split(size), strict=True):
        cka.update(x, y)
    return cka.value().item()


def debiased(X, Y):
    return rs.linear_cka(X, Y, debiased=True).item()


# -- ckatorch ----------------------------------------------------------------
def test_ckatorch_agrees(pair):
    core = pytest.importorskip("ckatorch.core")
    plain = core.cka_base(*pair).item()
    assert rs.linear_cka(*pair).item() == pytest.approx(plain, abs=1e-10)
    unbiased = core.cka_base(*pair, unbiased=True).item()
    assert debiased(*pair) == pytest.approx(unbiased, abs=1e-10)
    # Equal batches, as in the paper.
    stacks = (torch.stack(V.split(len(V) // 2)) for V in pair)
    batched = core.cka_batch(*stacks).item()
    found = minibatches(*pair, len(pair[0]) // 2)
    assert found == pytest.approx(batched, abs=1e-10)


def test_ckatorch_ignores_unbiased_beside_its_method_hsic(pair):
    core = pytest.importorskip("ckatorch.core")
    other = core.cka_base(*pair, unbiased=True, method="hsic").item()
    assert other == pytest.approx(rs.linear_cka(*pair).item(), abs=1e-10)
    assert other != pytest.approx(debiased(*pair), abs=0.01)


# -- pytorch-cka -------------------------------------------------------------
def test_pytorch_cka_agrees(pair):
    package = pytest.importorskip("cka")
    other = package.cka_from_features(*pair).item()
    assert debiased(*pair) == pytest.approx(other, abs=1e-10)


def test_pytorch_cka_clips_the_negative_half_of_chance():
    package = pytest.importorskip("cka")
    pairs = [unrelated() for _ in range(30)]
    ours = torch.tensor([debiased(*pair) for pair in pairs])
    theirs = torch.stack([package.cka_from_features(*pair)[0, 0] for pair in pairs])
    torch.testing.assert_close(ours.clamp(min=0), theirs.float())
    assert ours.mean().abs() < 0.01 < theirs.mean()


def test_pytorch_cka_loses_float32_features_with_a_large_mean(pair):
    package = pytest.importorskip("cka")
    X, Y = pair[0].float() + 1000, pair[1].float()
    assert debiased(X, Y) == pytest.approx(debiased(*pair), abs=1e-4)
    other = package.cka_from_features(X, Y).item()
    assert other != pytest.approx(debiased(*pair), abs=0.05)


# -- torch-cka ---------------------------------------------------------------
def torch_cka(X, Y, size):
    package = pytest.importorskip("torch_cka")
    nets = [torch.nn.Sequential(torch.nn.Identity()) for _ in "XY"]
    compared = package.CKA(
        *nets, "X", "Y", model1_layers=["0"], model2_layers=["0"], device="cpu"
    )
    sets = (torch.utils.data.TensorDataset(V.float()) for V in (X, Y))
    compared.compare(*(torch.utils.data.DataLoader(s, batch_size=size) for s in sets))
    return compared.export()["CKA"].item()


def test_torch_cka_agrees_on_equal_batches(pair):
    size = len(pair[0]) // 2
    other = torch_cka(*pair, size)
    assert minibatches(*pair, size) == pytest.approx(other, abs=1e-4)


def test_torch_cka_gives_a_last_small_batch_the_weight_of_a_whole_one():
    X, _ = unrelated()
    Y = torch.cat([X[:25], torch.randn(5, 200).double()])
    assert minibatches(X, Y, 25) > torch_cka(X, Y, 25) + 0.1


# -- rsatoolbox --------------------------------------------------------------
def rsa(X, Y, method):
    toolbox = pytest.importorskip("rsatoolbox")
    data = [toolbox.data.Dataset(V.numpy()) for V in (X, Y)]
    rdms = [toolbox.rdm.calc_rdm(one, method="euclidean") for one in data]
    return toolbox.rdm.compare(*rdms, method=method).item()


def test_rsatoolbox_agrees_from_distances_alone(pair):
    whitened = rsa(*pair, "cosine_cov")
    assert rs.linear_cka(*pair).item() == pytest.approx(whitened, abs=1e-9)
    distance = rs.procrustes_distance(*pair).item()
    assert 1 - distance**2 / 2 == pytest.approx(rsa(*pair, "bures"), abs=1e-6)


def test_rsatoolboxs_bures_metric_is_squared_and_keeps_the_scale(pair):
    X, Y = ((V - V.mean(0)) for V in pair)
    X, Y = (V / torch.linalg.matrix_norm(V) for V in (X, Y))
    # Its "euclidean" distances are divided by the number of features.
    X, Y = (V * V.shape[1] ** 0.5 for V in (X, Y))
    distance = rs.procrustes_distance(*pair).item()
    assert distance**2 == pytest.approx(rsa(X, Y, "bures_metric"), abs=1e-6)
    assert rsa(*pair, "bures_metric") > 2
