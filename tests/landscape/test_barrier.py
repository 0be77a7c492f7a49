from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import repscope as rs
from repscope.errors import NonFiniteError, UsageError

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] * X[:, 1] > 0).long()


def mlp(width=6):
    return nn.Sequential(
        nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 2),
    )  # fmt: skip


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(5, 4, 1), nn.GELU()), nn.Flatten(),
        nn.Linear(16, 7), nn.BatchNorm1d(7), nn.Sigmoid(), nn.Linear(7, 3),
    )  # fmt: skip


def loss(model):
    with torch.no_grad():
        return nn.functional.cross_entropy(model(X), Y).item()


def untouched(*models):
    """Return a check that nothing about the models has changed."""
    before = [copy.deepcopy(m.state_dict()) for m in models]
    modes = [[sub.training for sub in m.modules()] for m in models]
    rng = torch.get_rng_state()

    def check():
        for model, state, mode in zip(models, before, modes, strict=True):
            for name, value in model.state_dict().items():
                assert torch.equal(value, state[name])
            assert [sub.training for sub in model.modules()] == mode
        assert torch.equal(torch.get_rng_state(), rng)

    return check


# -- the line ----------------------------------------------------------------
def test_the_losses_are_those_of_the_weights_on_the_line():
    a, b = mlp(), mlp()
    check = untouched(a, b)
    found = rs.loss_barrier(a, b, loss, points=5)
    check()
    states = [
        {k: v.double().numpy() for k, v in m.state_dict().items()} for m in (a, b)
    ]
    expected = []
    for t in np.linspace(0, 1, 5):
        w = {k: (1 - t) * states[0][k] + t * states[1][k] for k in states[0]}
        h = np.tanh(X.double().numpy() @ w["0.weight"].T + w["0.bias"])
        h = np.maximum(h @ w["2.weight"].T + w["2.bias"], 0)
        z = h @ w["4.weight"].T + w["4.bias"]
        picked = z[np.arange(64), Y.numpy()]
        expected.append((np.log(np.exp(z).sum(1)) - picked).mean())
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    assert found.losses[[0, -1]].tolist() == [loss(a), loss(b)]
    excess = np.array(expected) - np.linspace(expected[0], expected[-1], 5)
    assert found.barrier.item() == pytest.approx(max(excess.max(), 0), abs=1e-6)
    assert found.argmax == found.alphas[int(np.argmax(excess))]
    assert found.to_frame().shape == (5, 2)


def test_the_barrier_of_a_double_well_is_its_hill():
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for model, at in ((a, -1.0), (b, 1.0)):
        nn.init.constant_(model.weight, at)

    def hill(model):  # 1 at 0, 0 at both ends; tilted by a straight line
        return (model.weight.square() - 1).square() + 3 * model.weight + 3

    found = rs.loss_barrier(a, b, hill)
    assert (found.barrier.item(), found.argmax) == (1.0, 0.5)
    assert len(found.losses) == 25
    back = rs.loss_barrier(b, a, hill)
    torch.testing.assert_close(back.losses, found.losses.flip(0))
    assert rs.loss_barrier(a, a, hill).barrier == 0
    assert rs.loss_barrier(a, b, lambda m: -hill(m)).barrier == 0  # a valley has none


def test_the_reference_stands_beside_it_in_words():
    a, b = mlp(), mlp()
    plain = rs.loss_barrier(a, b, loss, points=3)
    assert math.isnan(plain.ratio)
    assert "linearly connected up to" in str(plain)
    flat = rs.loss_barrier(a, a, loss, points=3)
    assert str(flat).startswith("linearly connected up to 0 at 3 points; no reference")
    assert str(plain).endswith("no reference between two seeds of one optimizer")
    beside = rs.loss_barrier(a, b, loss, points=3, reference=plain)
    assert beside.ratio == pytest.approx(1) or plain.barrier == 0
    number = rs.loss_barrier(a, b, lambda m: -loss(m), points=3, reference=0.25)
    assert number.ratio == pytest.approx(number.barrier.item() / 0.25)
    assert str(number).endswith("0.25 between two seeds of one optimizer")
    flat, hill = torch.tensor(0.0), torch.tensor(1.0)
    nothing = rs.Barrier(plain.alphas, plain.losses, flat, 0.0, reference=0.0)
    something = rs.Barrier(plain.alphas, plain.losses, hill, 0.5, reference=0.0)
    assert math.isnan(nothing.ratio)
    assert something.ratio == math.inf


def test_every_point_meets_the_same_noise():
    model = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.5), nn.Linear(9, 2)).train()
    check = untouched(model)
    found = rs.loss_barrier(model, model, loss, points=3)
    check()
    assert found.losses.unique().numel() == 1


def test_a_line_on_which_the_loss_is_not_a_number():
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(a.weight, -1.0)
    nn.init.constant_(b.weight, 1.0)
    at_zero = rs.loss_barrier(a, b, lambda m: 1 / m.weight.abs(), points=3)
    assert (at_zero.barrier.item(), at_zero.argmax) == (math.inf, 0.5)
    undefined = rs.loss_barrier(a, b, lambda m: m.weight / m.weight, points=3)
    assert undefined.barrier.isnan()
    assert undefined.argmax == 0.5


def test_a_rescaled_relu_pair_is_one_function_with_a_barrier():
    """Why a barrier is no proof of another solution, matched or not."""
    a = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[0].weight *= 8
        b[0].bias *= 8
        b[2].weight /= 8
    assert rs.disagreement(a(X), b(X)) == 0

    def distance(model):
        with torch.no_grad():
            return (model(X) - a(X)).square().mean()

    found = rs.loss_barrier(a, b, distance, match=True)
    assert found.losses[-1] < 1e-12
    assert found.barrier > 0.01


# -- batch normalisation -----------------------------------------------------
def test_statistics_are_computed_anew_at_every_point():
    torch.manual_seed(3)
    a, b = (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval() for _ in "ab")
    batches = [X[:32], X[32:]]
    seen = []

    def evaluate(model):
        assert not model.training
        seen.append(copy.deepcopy(model))
        return model(X).square().mean()

    check = untouched(a, b)
    rs.loss_barrier(a, b, evaluate, points=3, recalibrate=[(x, None) for x in batches])
    check()
    for model in seen:
        with torch.no_grad():
            outputs = [model[0](x).double() for x in batches]
        mean = torch.stack([z.mean(0) for z in outputs]).mean(0)
        variance = torch.stack([z.var(0) for z in outputs]).mean(0)
        torch.testing.assert_close(model[1].running_mean.double(), mean)
        torch.testing.assert_close(model[1].running_var.double(), variance)
        assert model[1].momentum == 0.1
    by_hand = rs.loss_barrier(a, b, evaluate, points=3, recalibrate=lambda model: None)
    middle = seen[-2][1].running_mean
    torch.testing.assert_close(middle, a[1].running_mean.lerp(b[1].running_mean, 0.5))
    assert by_hand.losses.isfinite().all()


def test_dropout_stays_out_of_the_statistics():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4)).train()
    means = []
    rs.loss_barrier(
        model, model, lambda m: means.append(m[1].running_mean) or 0.0,
        points=3, recalibrate=[X],
    )  # fmt: skip
    torch.testing.assert_close(means[1], X.mean(0))


# -- matching ----------------------------------------------------------------
def shuffled(model, orders):
    """Return the same function with its hidden units in another order."""
    clone = copy.deepcopy(model)
    layers = [m for m in clone.modules() if hasattr(m, "weight")]
    previous = None
    with torch.no_grad():
        for module in layers:
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if not norm:
                if previous is not None:
                    blocks = module.weight.reshape(
                        len(module.weight), len(previous), -1
                    )
                    module.weight.copy_(
                        blocks[:, previous].reshape(module.weight.shape)
                    )
                previous = next(orders, None)
            if previous is not None:
                for tensor in [*module.parameters(), *module.buffers()]:
                    if tensor.ndim:
                        tensor.copy_(tensor[previous])
    return clone


@pytest.mark.parametrize(
    ("build", "widths", "x"),
    [(mlp, (6, 6), X), (convnet, (5, 4, 7), torch.randn(8, 2, 4, 4))],
    ids=["mlp", "convnet"],
)
def test_a_permuted_network_is_found_to_be_the_same(build, widths, x):
    a = build()
    for _ in range(3):
        a(x)  # in training mode: batch statistics of its own
    a.eval()
    b = shuffled(a, iter([torch.randperm(n) for n in widths]))
    torch.testing.assert_close(a(x), b(x))
    check = untouched(a, b)
    matched = rs.match_units(a, b)
    check()
    for name, value in matched.state_dict().items():
        assert torch.equal(value, a.state_dict()[name]), name

    def distance(model):
        with torch.no_grad():
            return (model(x) - a(x)).square().mean()

    keep = {"recalibrate": lambda model: None}
    assert rs.loss_barrier(a, b, distance, points=5, match=True, **keep).barrier < 1e-12
    apart = rs.loss_barrier(a, b, distance, points=5, **keep)
    assert apart.barrier > 1e-6
    assert not apart.matched


def test_matching_keeps_the_function_and_brings_weights_nearer():
    a, b = convnet().eval(), convnet().eval()
    x = torch.randn(8, 2, 4, 4)
    matched = rs.match_units(a, b)
    torch.testing.assert_close(matched(x), b(x))

    def apart(model):
        pairs = zip(a.parameters(), model.parameters(), strict=True)
        return sum((p - q).square().sum().item() for p, q in pairs)

    assert apart(matched) < apart(b)


@pytest.mark.parametrize("seed", range(4))
def test_one_hidden_layer_is_matched_as_well_as_any_order_can(seed):
    torch.manual_seed(seed)
    a, b = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in "ab")

    def apart(model):
        pairs = zip(a.parameters(), model.parameters(), strict=True)
        return sum((p - q).square().sum().item() for p, q in pairs)

    orders = itertools.permutations(range(4))
    best = min(apart(shuffled(b, iter([torch.tensor(order)]))) for order in orders)
    assert apart(rs.match_units(a, b)) == pytest.approx(best)


def test_parametrized_weights_are_matched_by_their_value():
    a = mlp()
    b = shuffled(a, iter([torch.randperm(6), torch.randperm(6)]))
    nn.utils.parametrizations.weight_norm(b[0])
    found = rs.loss_barrier(a, b, loss, points=3, match=True)
    assert found.barrier == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "LayerNorm"),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1, groups=2)), "groups=2"),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(), nn.Linear(4, 2)), "'2', Linear"),
        (nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)), "'1', Conv1d"),
        (nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(2)), "'1', Flatten"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(7)), "'1', BatchNorm1d"),
        (nn.Sequential(nn.Sequential(nn.Softmax(-1))), "'0.0', Softmax"),
        (nn.Linear(4, 4), "got a Linear; pass the Sequential inside it"),
        (nn.Sequential(*[nn.Linear(4, 4)] * 2), "'1', Linear"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_matched_are_named(model, text):
    with pytest.raises(UsageError, match=text):
        rs.match_units(model, model)


# -- bad input ---------------------------------------------------------------
def test_lines_that_cannot_be_drawn_are_named():
    a = mlp()
    with pytest.raises(
        UsageError, match=r"'0.weight' has shape \(6, 4\) in model_a and"
    ):
        rs.loss_barrier(a, mlp(7), loss)
    with pytest.raises(
        UsageError, match=r"'0.weight' has shape \(6, 4\) in model_a and"
    ):
        rs.match_units(a, mlp(7))
    with pytest.raises(
        UsageError, match=r"'0.bias' has shape \(6,\) in model_a and none"
    ):
        rs.loss_barrier(a, nn.Sequential(nn.Linear(4, 6, bias=False)), loss)
    with pytest.raises(UsageError, match=r"points must be at least 3 .* got 2"):
        rs.loss_barrier(a, a, loss, points=2)
    with pytest.raises(NonFiniteError, match=r"evaluate\(model_a\) is nan"):
        rs.loss_barrier(a, a, lambda m: math.nan)
    bad = copy.deepcopy(a)
    bad[0].weight.data[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"model_b: '0.weight' has 1 non-finite"):
        rs.loss_barrier(a, bad, loss)


def test_batch_statistics_must_not_be_averaged_unawares():
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    with pytest.raises(UsageError, match="'1' keeps batch statistics"):
        rs.loss_barrier(model, model, loss)
    with pytest.raises(
        UsageError, match="pass a list or a DataLoader, not an iterator"
    ):
        rs.loss_barrier(model, model, loss, recalibrate=iter([X]))
    with pytest.raises(UsageError, match="recalibrate has no batches"):
        rs.loss_barrier(model, model, loss, recalibrate=[])
