"""
Comparing two optimizers over seeds
===================================

Equal seeds share initial weights and the order of the data, so their runs are compared
pair by pair. The accuracies here are made up, so that the right answer is known.
"""

# %%
# Ten seeds differ by many points among themselves. In each of them "shampoo" is ahead
# of "sgd" by two points, give or take half a point.
import matplotlib.pyplot as plt

import repscope as rs

luck = [0.0, 6.0, -5.0, 3.0, -8.0, 9.0, -2.0, 4.0, -6.0, 1.0]
ahead = [2.0, 2.5, 1.5, 2.0, 2.5, 1.5, 2.0, 2.5, 1.5, 2.0]
sgd = {seed: 80 + luck[seed] for seed in range(10)}
shampoo = {seed: sgd[seed] + ahead[seed] for seed in range(10)}

# %%
# Each mean by itself is uncertain, and the two intervals overlap. The interval of the
# differences does not see what the two runs of a seed have in common.
each = {"sgd": rs.mean_interval(sgd), "shampoo": rs.mean_interval(shampoo)}
difference = rs.paired_difference(shampoo, sgd)
difference.to_frame()

# %%
# The mean difference is two points. All ten differences have one sign, so no smaller p
# is possible with ten seeds: 2 of the 2^10 ways to flip signs are as extreme.
assert abs(difference.estimate - 2) < 1e-9
assert each["sgd"].high > each["shampoo"].low
assert difference.p_value == difference.p_min == 2**-9

# %%
# Left: what each optimizer reached. Right: their difference, and a margin of one point.
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
rs.plots.accuracy(each, ax=left, ylabel="accuracy, %")
right.axvspan(-1, 1, color="0.9")
right.text(0, 0.8, "within the margin", ha="center")
right.axvline(0, color="0.5", linewidth=0.8)
right.hlines(0, difference.low, difference.high, color="0.1")
right.plot(difference.estimate, 0, "o", color="0.1")
right.set(yticks=[], ylim=(-1, 1), xlabel="shampoo - sgd, points")
plt.show()

# %%
# A verdict compares the interval with a margin that was fixed before the run: the
# smallest difference that would matter. One interval, four questions, four answers.
assert 1 < difference.low < difference.high < 3

for margin, direction, answer in (
    (1, "greater", "holds"),
    (1, "less", "opposite sign"),
    (3, "greater", "no difference"),
    (2, "greater", "not decided"),
):
    found = rs.verdict(difference, margin=margin, direction=direction)
    print(f"{direction} by more than {margin}: {found}")
    assert found == answer

# %%
# Values are matched by seed, never by position: a seed that one side lacks is an error,
# because dropping it silently would flatter whoever failed in it.
try:
    rs.paired_difference({0: 82.0, 1: 88.5}, {0: 80.0, 2: 75.0})
except rs.errors.MetricError as error:
    print(error)
else:
    raise AssertionError("unmatched seeds were compared")
