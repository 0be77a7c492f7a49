from __future__ import annotations

import copy

import numpy as np
import oracles
import pytest
import torch
from torch import nn

import repscope as rs
from repscope.errors import MetricError, NonFiniteError, UnknownName, UsageError
from repscope.landscape import DEFAULT_LEVELS, SPARSITY_METRICS, accuracy_at
from repscope.results import SparsityCurve


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)).eval()


def weights(model):
    return [p.detach().double().numpy() for p in model.parameters() if p.ndim >= 2]


def zeroed(model):
    flat = np.concatenate([w.ravel() for w in weights(model)])
    return float((flat == 0).sum())


def collect(model, **options):
    """Return the curve and the pruned weights that evaluate saw, dense last."""
    seen = []
    curve = rs.sparsity_curve(
        model, lambda m: seen.append(weights(m)) or 0.0, **options
    )
    return curve, seen


def test_exactly_the_smallest_weights_of_all_layers_are_zeroed(model):
    levels = [0.0, 0.29, 0.5, 0.95, 1.0]
    curve, seen = collect(model, levels=levels)
    counts = [0, 28, 49, 94, 99]  # floor(p * 99)
    for pruned, count in zip(seen, counts, strict=False):
        for found, expected in zip(
            pruned, oracles.smallest(weights(model), count), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
    assert curve.sparsity.tolist() == [count / 99 for count in counts]
    magnitudes = np.sort(np.abs(np.concatenate([w.ravel() for w in weights(model)])))
    assert curve.threshold.tolist() == [0, *(magnitudes[c - 1] for c in counts[1:])]


def test_a_fraction_of_a_hundred_weights_is_exact():
    layer = nn.Linear(100, 1)
    levels = [i / 100 for i in range(101)]
    curve = rs.sparsity_curve(layer, zeroed, levels=levels)
    assert curve.score.tolist() == list(range(101))


def test_layers_each_lose_their_own_share(model):
    curve, seen = collect(model, levels=[0.5], scope="layer")
    first, second = weights(model)
    np.testing.assert_array_equal(seen[0][0], oracles.smallest([first], 27)[0])
    np.testing.assert_array_equal(seen[0][1], oracles.smallest([second], 22)[0])
    assert curve.sparsity.tolist() == [49 / 99]
    assert curve.threshold.isnan().all()


def test_balanced_ranks_by_magnitude_over_rms(model):
    levels = [0.3, 0.7]
    curve, seen = collect(model, levels=levels, scope="balanced")
    scaled = [w / np.sqrt(np.mean(w**2)) for w in weights(model)]
    for pruned, level in zip(seen, levels, strict=False):
        expected = oracles.smallest(scaled, int(level * 99))
        for found, kept in zip(pruned, expected, strict=True):
            np.testing.assert_array_equal(found != 0, kept != 0)
    assert curve.threshold.isnan().all()


def test_balanced_is_immune_to_rescaling_a_relu_pair_and_global_is_not(model):
    same = copy.deepcopy(model)
    with torch.no_grad():
        same[0].weight *= 8
        same[0].bias *= 8
        same[2].weight /= 8
    x = torch.randn(20, 6)
    torch.testing.assert_close(same(x), model(x))

    def distance(scope):
        def outputs(m):
            with torch.no_grad():
                return m(x).square().sum().item()

        options = {"levels": [0.3, 0.6], "scope": scope}
        ours = rs.sparsity_curve(model, outputs, **options).score
        theirs = rs.sparsity_curve(same, outputs, **options).score
        return float((ours - theirs).abs().max())

    assert distance("balanced") < 1e-4
    assert distance("layer") < 1e-4
    assert distance("global") > 1e-2


def test_a_threshold_zeroes_every_weight_up_to_it(model):
    with torch.no_grad():
        model[0].weight[0, :3] = torch.tensor([0.0, 0.125, -0.125])
    flat = np.abs(np.concatenate([w.ravel() for w in weights(model)]))
    levels = [0.0, 0.125, 100.0]
    curve = rs.sparsity_curve(model, zeroed, levels=levels, by="threshold")
    expected = [float((flat <= level).sum()) for level in levels]
    assert curve.score.tolist() == expected
    assert curve.sparsity.tolist() == [count / 99 for count in expected]
    assert curve.threshold.tolist() == [0.0, 0.125, flat.max()]
    rms = [np.sqrt(np.mean(w**2)) for w in weights(model)]
    balanced = rs.sparsity_curve(
        model, zeroed, levels=[0.5], by="threshold", scope="balanced"
    )
    pairs = zip(weights(model), rms, strict=True)
    assert balanced.score.item() == sum((np.abs(w) <= 0.5 * r).sum() for w, r in pairs)


def test_ties_go_in_order_of_parameters_and_memory():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for parameter in model.parameters():
        nn.init.constant_(parameter, -0.5)
    _, seen = collect(model, levels=[0.5, 0.67])
    assert seen[0][0].tolist() == [[0, 0], [0, -0.5]]
    assert seen[1][0].tolist() == [[0, 0], [0, 0]]
    assert seen[1][1].tolist() == [[-0.5, -0.5]]


def test_weights_already_zero_are_zeroed_first():
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0, 2.0, 0.0]]))
    curve = rs.sparsity_curve(layer, zeroed, levels=[0.25, 0.5, 0.75])
    assert curve.score.tolist() == [2, 2, 3]
    assert curve.sparsity.tolist() == [0.25, 0.5, 0.75]
    assert curve.threshold.tolist() == [0, 0, 2]


def test_a_tensor_of_zeros_is_zeroed_first_when_balanced(model):
    nn.init.zeros_(model[2].weight)
    curve, seen = collect(model, levels=[45 / 99, 46 / 99], scope="balanced")
    np.testing.assert_array_equal(seen[0][0], weights(model)[0])
    assert (seen[1][0] == 0).sum() == 1
    assert curve.sparsity.tolist() == [45 / 99, 46 / 99]


def test_only_tensors_of_two_dimensions_or_more_take_part():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten())

    def others(m):
        assert not m[0].weight.any()
        return sum(p.count_nonzero().item() for p in m.parameters() if p.ndim < 2)

    dense = sum(p.count_nonzero().item() for p in model.parameters() if p.ndim < 2)
    assert rs.sparsity_curve(
        model, lambda m: others(m) if not m[0].weight.any() else -1, levels=[1.0]
    ).score.tolist() == [dense]


def test_the_model_is_left_untouched_even_by_a_rude_evaluate(model):
    model.train()
    before = copy.deepcopy(model.state_dict())
    held = [id(p) for p in model.parameters()]
    versions = [p._version for p in model.parameters()]

    def rude(m):
        assert m is not model
        assert m.training
        with torch.no_grad():
            for p in m.parameters():
                p.fill_(7.0)
        m.eval()
        return 1.0

    curve = rs.sparsity_curve(model, rude, levels=[0.0, 0.5])
    assert curve.score.tolist() == [1.0, 1.0]
    assert model.training
    assert [id(p) for p in model.parameters()] == held
    assert [p._version for p in model.parameters()] == versions
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_dense_score_is_that_of_the_model_and_of_level_zero(model):
    x = torch.randn(20, 6)
    curve = rs.sparsity_curve(model, lambda m: m(x).sum())
    assert curve.dense_score == curve.score[0].item() == model(x).sum().item()
    assert curve.sparsity.tolist() == [np.floor(p * 99) / 99 for p in DEFAULT_LEVELS]
    assert curve.to_frame().shape == (len(DEFAULT_LEVELS), 3)
    assert {0.0, 0.5, 0.9, 0.95, 0.98, 0.99} <= set(DEFAULT_LEVELS)


def test_parametrized_weights_are_pruned_by_their_effective_value():
    class Square(nn.Module):
        def forward(self, phi):
            return phi * phi.abs()

    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -0.1, 2.0, 1.0]]))
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight.copy_(plain.weight * plain.weight.abs())
    nn.utils.parametrize.register_parametrization(layer, "weight", Square())
    options = {"levels": [1.5], "by": "threshold", "scope": "global"}
    ours = rs.sparsity_curve(layer, lambda m: m.weight.sum(), **options)
    expected = rs.sparsity_curve(plain, lambda m: m.weight.sum(), **options)
    assert ours.score.item() == expected.score.item() == 13.0
    assert ours.dense_score == pytest.approx(expected.dense_score)
    # The copies share a generated class with the model: it must still work.
    assert layer.weight[0].tolist() == pytest.approx([9.0, -0.01, 4.0, 1.0])
    assert isinstance(layer.weight, torch.Tensor)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")


def test_readings_take_the_level_that_was_measured_or_none():
    layer = nn.Linear(997, 1)  # floor(0.95 * 997) / 997 = 0.94985
    curve = rs.sparsity_curve(layer, zeroed, levels=[0.0, 0.9, 0.95])
    assert SPARSITY_METRICS["accuracy_at_90"](curve).item() == 897
    assert SPARSITY_METRICS["accuracy_at_95"](curve).item() == 947
    assert accuracy_at(curve, 0.98).isnan()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"levels": [0.5, 0.4]}, r"strictly ascending within \[0, 1\]"),
        ({"levels": [0.5, 0.5]}, "strictly ascending"),
        ({"levels": [0.5, 90]}, r"got \[0.5, 90.0\]"),
        ({"levels": [float("nan")]}, "strictly ascending"),
        ({"levels": []}, "strictly ascending"),
        ({"levels": [-1.0], "by": "threshold"}, r"within \[0, inf\]"),
        ({"by": "threshold"}, 'by="threshold" needs levels='),
        ({"by": "threshold", "levels": [1.0], "scope": "layer"}, "same for every"),
        ({"scope": "layers"}, "did you mean 'layer'"),
        ({"by": "fractions"}, "did you mean 'fraction'"),
    ],
)
def test_options_that_make_no_sense_are_named(model, options, text):
    with pytest.raises(UsageError, match=text):
        rs.sparsity_curve(model, zeroed, **options)


def test_models_that_cannot_be_pruned_are_named(model):
    with pytest.raises(MetricError, match="no parameter with 2 dimensions"):
        rs.sparsity_curve(nn.BatchNorm1d(3), zeroed)
    with torch.no_grad():
        model[2].weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"parameter '2\.weight' has 1 non-finite"):
        rs.sparsity_curve(model, zeroed)


# -- random numbers, statistics and shares ------------------------------------
def test_an_evaluate_that_draws_costs_the_caller_no_random_number():
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 5))
    x, before = torch.randn(20, 6), torch.get_rng_state()
    curve = rs.sparsity_curve(model, lambda m: m(x).sum(), levels=[0.0, 1e-9])
    assert torch.equal(torch.get_rng_state(), before)
    # The same noise at every level, so that only the weights differ.
    assert curve.score[0] == curve.score[1] == curve.dense_score


def test_batch_statistics_of_the_model_stay_what_they_were():
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9)).train()
    before = copy.deepcopy(model.state_dict())
    rs.sparsity_curve(model, lambda m: m(torch.randn(20, 6)).sum())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("scope", ["global", "layer", "balanced"])
def test_the_share_of_every_layer_is_told(model, scope):
    curve, seen = collect(model, levels=[0.0, 0.6], scope=scope)
    assert list(curve.layer_sparsity) == ["0.weight", "2.weight"]
    for shares, at in zip(curve.layer_sparsity.values(), (0, 1), strict=True):
        assert shares.tolist() == [(pruned[at] == 0).mean() for pruned in seen[:2]]


def test_excluded_weights_stay_and_are_not_counted(model):
    mask = torch.zeros(9, 6, dtype=torch.bool)
    mask[:, :2] = True
    kept = model[0].weight[:, :2].detach().numpy()
    curve, seen = collect(model, levels=[0.5, 1.0], exclude={"0.weight": mask})
    assert curve.n_excluded == 18
    assert curve.sparsity.tolist() == [40 / 81, 1.0]
    assert curve.layer_sparsity["0.weight"][1] == 1.0
    first, second = weights(model)
    expected = oracles.smallest([first[:, 2:], second], 40)
    for pruned in seen[:2]:
        np.testing.assert_array_equal(pruned[0][:, :2], kept)
    np.testing.assert_array_equal(seen[0][0][:, 2:], expected[0])
    np.testing.assert_array_equal(seen[0][1], expected[1])
    assert not seen[1][0][:, 2:].any()
    whole = {"2.weight": torch.ones(5, 9, dtype=torch.bool)}
    curve, seen = collect(model, levels=[1.0], exclude=whole, scope="balanced")
    np.testing.assert_array_equal(seen[0][1], second)
    assert list(curve.layer_sparsity) == ["0.weight"]


def test_masks_that_do_not_fit_the_model_are_named(model):
    yes = torch.ones(5, 9, dtype=torch.bool)
    with pytest.raises(UnknownName, match=r"did you mean '0.weight'"):
        collect(model, exclude={"0.weigth": yes})
    with pytest.raises(UnknownName, match=r"with '0.bias'"):
        collect(model, exclude={"0.bias": torch.ones(9, dtype=torch.bool)})
    with pytest.raises(UsageError, match=r"mask of shape \(9, 6\), got torch.bool of"):
        collect(model, exclude={"0.weight": yes})
    with pytest.raises(UsageError, match=r"got torch.float32 of shape \(5, 9\)"):
        collect(model, exclude={"2.weight": torch.ones(5, 9)})
    everything = {"0.weight": torch.ones(9, 6, dtype=torch.bool), "2.weight": yes}
    with pytest.raises(MetricError, match="leaves no weight to set to zero"):
        collect(model, exclude=everything)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_balanced_survives_any_scale(scale):
    layer = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, 5).double() * scale)
    curve = rs.sparsity_curve(
        layer, zeroed, levels=[0.8], by="threshold", scope="balanced"
    )
    assert curve.score.tolist() == [2.0]  # rms is 2.74: 1 and 2 are below 0.8 of it


def scores(*values, dense=97.0):
    levels = torch.arange(1, len(values) + 1) / 10
    return SparsityCurve(levels, levels, torch.tensor(values), dense)


@pytest.mark.parametrize(
    ("curve", "options", "expected"),
    [
        (scores(97.0, 96.5, 95.0), {}, 0.2),
        (scores(97.0, 96.0, 96.0), {}, 0.3),  # at the limit counts
        (scores(97.0, 90.0, 97.0), {}, 0.1),  # no island beyond a dip
        (scores(95.0, 97.0), {}, None),
        (scores(float("nan"), 97.0), {}, None),
        (scores(97.0, 96.5), {"tolerance": 0.0}, 0.1),
        (scores(80.0, 80.0, dense=80.0), {}, None),  # kept all of very little
        (scores(80.0, 79.5, dense=80.0), {"reference": 80.0}, None),  # the floor
        (scores(80.0, 79.5, dense=80.0), {"reference": 80.0, "floor": 50.0}, 0.2),
    ],
)
def test_sparsity_within_a_tolerance_of_a_common_reference(curve, options, expected):
    options = {"tolerance": 1.0, "reference": 97.0, "floor": 90.0} | options
    found = rs.sparsity_within(curve, **options)
    assert found.ndim == 0
    if expected is None:
        assert found.isnan()
    else:
        assert found.item() == pytest.approx(expected)


def test_a_negative_tolerance_is_refused():
    with pytest.raises(UsageError, match="tolerance must be at least 0, got -1"):
        rs.sparsity_within(scores(97.0), tolerance=-1, reference=97.0, floor=90.0)
