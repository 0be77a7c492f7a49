"""
Accuracy against sparsity
=========================

Set the smallest weights of a trained network to zero, without retraining, and see when
its accuracy goes. Then see why one curve is not enough.
"""

# %%
# Train a small network on the digits.
import copy
from collections import OrderedDict

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import repscope as rs

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
x = torch.tensor(images / 16, dtype=torch.float32)
y = torch.tensor(digits)
x_train, y_train, x_test, y_test = x[:1297], y[:1297], x[1297:], y[1297:]

model = nn.Sequential(
    OrderedDict(hidden=nn.Linear(64, 50), relu=nn.ReLU(), head=nn.Linear(50, 10))
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(15):
    for rows in torch.randperm(len(x_train)).split(32):
        loss = nn.functional.cross_entropy(model(x_train[rows]), y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# %%
# ``sparsity_curve`` needs the model and a function that scores one.
def accuracy(model):
    """Return the share of right answers on the test images."""
    with torch.no_grad():
        return (model(x_test).argmax(1) == y_test).double().mean()


levels = [0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0]
curve = rs.sparsity_curve(model, accuracy, levels=levels)
curve.to_frame()

# %%
# The two ends are known beforehand: at 0 nothing has changed, and with every weight
# gone the bias of the last layer gives one and the same answer to every image.
assert curve.score[0] == curve.dense_score
only_answer = model.head.bias.argmax()
assert curve.score[-1] == (y_test == only_answer).double().mean()

# %%
# Now the same function with other weights: everything into the hidden layer times 8,
# and everything out of it divided by 8. Around a ReLU that changes no output at all.
rescaled = copy.deepcopy(model)
with torch.no_grad():
    rescaled.hidden.weight *= 8
    rescaled.hidden.bias *= 8
    rescaled.head.weight /= 8
    assert torch.equal(model(x_test), rescaled(x_test))

# %%
# One threshold for all layers sees another network; ``scope="balanced"``, which divides
# each layer by its root mean square first, does not.
scopes = ("global", "balanced")
before = {s: rs.sparsity_curve(model, accuracy, scope=s) for s in scopes}
after = {s: rs.sparsity_curve(rescaled, accuracy, scope=s) for s in scopes}
assert torch.equal(before["balanced"].score, after["balanced"].score)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
for ax, scope in zip(axes, scopes, strict=True):
    curves = {"as trained": before[scope], "rescaled": after[scope]}
    rs.plots.sparsity(curves, ax=ax, title=scope)
plt.show()
