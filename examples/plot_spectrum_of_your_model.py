"""
The spectrum of your model
==========================

Attach a recorder to a training loop, open what it wrote, and see in how many
directions the hidden activations vary.
"""

# %%
# A small network and real data: the digits that come with scikit-learn.
import tempfile
from collections import OrderedDict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import repscope as rs

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
x = torch.tensor(images / 16, dtype=torch.float32)
y = torch.tensor(digits)
x_train, y_train, x_probe, y_probe = x[:1297], y[:1297], x[1297:], y[1297:]

model = nn.Sequential(
    OrderedDict(hidden=nn.Linear(64, 50), relu=nn.ReLU(), head=nn.Linear(50, 10))
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
rs.layers(model)

# %%
# The recorder runs the probe through the model at step 0 and at every 50th step after
# it. ``rec.step`` is the one line it needs in the loop.
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "sgd-0"

with rs.Recorder(
    model,
    path,
    layers="relu",
    every=50,
    probe=(x_probe, y_probe),
    optimizer=optimizer,
    meta={"seed": 0},
) as rec:
    for _ in range(10):
        for rows in torch.randperm(len(x_train)).split(32):
            loss = nn.functional.cross_entropy(model(x_train[rows]), y_train[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rec.step(loss=loss)
    rec.capture_now("end")

# %%
# What was recorded, and two numbers of it as a tidy table.
run = rs.open(path)
print(run.name, run.layers, run.steps)

table = rs.measure(run, metrics=["effective_rank", "class_cosine"])
table.pivot_table(index="step", columns="metric", values="value").round(3)

# %%
# Two spectra: the untrained network and the trained one. The left panel shows how large
# the variances are, the right one how they are shared out.
features = {"untrained": run.read("relu", step=0), "sgd": run.read("relu", tag="end")}
spectra = rs.spectra(features)

figure, (raw, shares) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
rs.plots.spectrum(spectra, ax=raw)
rs.plots.spectrum(spectra, ax=shares, normalize=True)
plt.show()

# %%
# What the recorder wrote is what the model computes, bit for bit.
with torch.no_grad():
    assert torch.equal(features["sgd"], model.relu(model.hidden(x_probe)))

# %%
# And the eigenvalues hold the variance of all units together, in descending order, so
# the effective rank lies between 1 and the number of units.
for name, spectrum in spectra.items():
    eigenvalues = spectrum.eigenvalues
    variance = features[name].double().var(dim=0).sum()
    assert torch.isclose(eigenvalues.sum(), variance)
    assert bool((eigenvalues.diff() <= 0).all())
    assert 1 <= spectrum.effective_rank <= 50

folder.cleanup()
