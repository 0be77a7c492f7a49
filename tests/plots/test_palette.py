"""One look per label, apart from every other for all kinds of colour vision."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from repscope import plots
from repscope.plots.palette import STYLES, Style

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear_rgb(color):
    c = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    to_xyz = [
        [0.4124, 0.3576, 0.1805],
        [0.2126, 0.7152, 0.0722],
        [0.0193, 0.1192, 0.9505],
    ]
    x, y, z = np.array(to_xyz) @ rgb / [0.95047, 1.0, 1.08883]
    f = [np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colors_stay_apart(vision) -> None:
    seen = [
        lab(np.clip(np.array(VISION[vision]) @ linear_rgb(style.color), 0, 1))
        for style in STYLES.values()
    ]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 17


def test_lines_are_readable_on_white() -> None:
    luminance = [
        linear_rgb(s.color) @ [0.2126, 0.7152, 0.0722] for s in STYLES.values()
    ]
    assert min(1.05 / (value + 0.05) for value in luminance) > 2.8


def test_dashes_and_markers_repeat_what_color_says() -> None:
    assert len({style.marker for style in STYLES.values()}) == len(STYLES)
    assert len({style.dash for style in STYLES.values()}) == len(STYLES)


def test_names_of_all_optimizers() -> None:
    names = ["sgd", "adam", "adamw", "shampoo", "p-sgd", "p-adam", "muon"]
    assert list(STYLES) == names
    assert [plots.display_name(name) for name in names] == [
        "SGD", "Adam", "AdamW", "Shampoo", "P-SGD", "Adam+P", "Muon",
    ]  # fmt: skip
    assert plots.display_name("my run") == "my run"


@pytest.mark.parametrize("label", ["p-adam", "P-Adam", "Adam+P", "adam+p"])
def test_a_label_and_its_display_name_look_alike(label) -> None:
    assert plots.style(label) == STYLES["p-adam"]


def test_other_labels_have_a_fixed_look_of_their_own() -> None:
    # A literal, because the look may not change between processes or releases.
    assert plots.style("untrained") == UNTRAINED
    looks = {plots.style(f"run {i}") for i in range(20)}
    assert len(looks) > 15
    assert not {look.color for look in looks} & {s.color for s in STYLES.values()}


UNTRAINED = Style("#2F6B5E", (0, (5, 1.2, 1, 1.2)), "<")
