"""
One set of features, six ranks
==============================

"Effective rank" names different numbers in different papers. Here they are all read
from the same features, whose spectrum we choose, so that we know what each should say.
"""

# %%
# Features with a covariance that has exactly the eigenvalues 1, 1/2, 1/3, ...: centred
# orthonormal columns, scaled and then rotated.
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import repscope as rs

torch.manual_seed(0)
n_samples, n_features = 1000, 50

eigenvalues = 1 / torch.arange(1, n_features + 1, dtype=torch.float64)
columns = torch.randn(n_samples, n_features, dtype=torch.float64)
columns = torch.linalg.qr(columns - columns.mean(0)).Q
rotation = torch.linalg.qr(torch.randn(n_features, n_features).double()).Q
centred = columns * (eigenvalues * (n_samples - 1)).sqrt() @ rotation

assert torch.allclose(rs.spectrum(centred).eigenvalues, eigenvalues)

# %%
# The same features with a common offset, such as activations after a ReLU have.
shifted = centred + 1.0


def ranks(X):
    """Return six ranks of the same features."""
    s = rs.spectrum(X)
    return {
        "rank": rs.hill_number(s, q=0),
        "rankme": rs.rankme(X),
        "of singular values": rs.effective_rank(s, of="singular_values"),
        "effective_rank": rs.effective_rank(s),
        "participation_ratio": rs.participation_ratio(s),
        "stable_rank": rs.stable_rank(s),
    }


table = pd.DataFrame({"centred": ranks(centred), "shifted": ranks(shifted)})
table = table.astype(float)
table.round(2)

# %%
# From a few directions to all of them: a rank without its definition says nothing.
figure, ax = plt.subplots(figsize=(8, 3.2), layout="constrained")
table[::-1].plot.barh(ax=ax, xlabel="directions", color=["#0059A8", "#C44601"])
plt.show()

# %%
# Rank, effective rank, participation ratio and stable rank are the Hill numbers of
# order 0, 1, 2 and infinity of the same shares, so their order is a theorem.
for column in table:
    values = table[column]
    assert values["rank"] >= values["effective_rank"] >= values["participation_ratio"]
    assert values["participation_ratio"] >= values["stable_rank"] >= 1

# %%
# Square roots flatten the shares: singular values never give the smaller number.
for column in table:
    values = table[column]
    assert values["of singular values"] >= values["effective_rank"]

# %%
# An offset that all samples share leaves the covariance as it is, and with it every
# rank that is read from it. RankMe does not centre: without an offset it is the
# effective rank of the singular values, and a huge offset drives it to 1, whatever the
# features do around it.
rest = table.drop(index="rankme")
assert np.allclose(rest["centred"], rest["shifted"])
assert np.isclose(
    table.loc["rankme", "centred"], table.loc["of singular values", "centred"]
)
assert rs.rankme(centred + 1e6) < 1.01
