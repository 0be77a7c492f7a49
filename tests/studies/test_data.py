import gzip
import os
import struct

import pytest
import torch
from sklearn.datasets import load_digits

from repscope import errors
from repscope.studies import load
from repscope.studies.data import read_idx


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.numpy().tobytes()


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def pixels(n):
        return torch.randint(0, 256, (n, 4, 4), generator=generator).byte()

    files = {
        "train-images-idx3-ubyte": pixels(12),
        "train-labels-idx1-ubyte": (torch.arange(12) % 4).byte(),
        "t10k-images-idx3-ubyte": pixels(8),
        "t10k-labels-idx1-ubyte": (torch.arange(8) % 4).byte(),
    }
    for i, (name, array) in enumerate(files.items()):
        raw = idx(array)
        if i % 2:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (tmp_path / name).write_bytes(raw)
    return tmp_path, files


def test_digits_are_the_embedded_ones_with_a_fixed_split():
    data, again = load("digits"), load("digits")
    assert torch.equal(data.x_train, again.x_train)
    assert data.x_train.shape == (1297, 64)
    assert data.x_test.shape == (500, 64)
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    everything = torch.cat([data.x_train, data.x_test]).double().sum()
    assert float(everything) == pytest.approx(load_digits().data.sum() / 16)
    assert set(data.y_test.tolist()) == set(range(10))


def test_idx_files_gzipped_or_not_in_the_folder_or_below_it(folder):
    path, files = folder
    (path / "sub").mkdir()
    data = load("mnist", data_dir=path)
    assert data.x_train.shape == (12, 16)
    expected = files["train-images-idx3-ubyte"].reshape(12, 16) / 255
    torch.testing.assert_close(data.x_train, expected)
    assert data.y_test.tolist() == [0, 1, 2, 3] * 2


def test_the_environment_names_the_folder(folder, monkeypatch):
    path, _ = folder
    inside = path.parent / "data"
    inside.mkdir()
    path.rename(inside / "kmnist")
    monkeypatch.setenv("REPSCOPE_DATA", str(inside))
    assert load("kmnist").name == "kmnist"


def test_an_unknown_set_offers_names():
    with pytest.raises(errors.UnknownName, match="did you mean 'mnist'"):
        load("minst")


def test_no_folder_no_data_and_never_another_set(tmp_path, monkeypatch):
    monkeypatch.delenv("REPSCOPE_DATA", raising=False)
    with pytest.raises(errors.DataError, match="REPSCOPE_DATA"):
        load("mnist")
    with pytest.raises(errors.DataError, match="no data folder"):
        load("mnist", data_dir=tmp_path / "nowhere")
    with pytest.raises(errors.DataError, match="has no train-images"):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: b"not idx" + raw, "not an IDX file"),
        (lambda raw: b"", "not an IDX file"),
        (lambda raw: raw[:-1], "incomplete or damaged"),
        (lambda raw: raw + b"x", "incomplete or damaged"),
        (lambda raw: gzip.compress(raw)[:-9], "cannot read"),
        (lambda raw: raw[:2] + b"\x0d" + raw[3:], "not an IDX file"),
    ],
)
def test_damaged_files_are_refused(tmp_path, spoil, message):
    path = tmp_path / "file"
    path.write_bytes(spoil(idx(torch.zeros(3, 2, 2).byte())))
    with pytest.raises(errors.DataError, match=message):
        read_idx(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(errors.DataError, match="cannot read"):
        read_idx(tmp_path / "absent")


def test_labels_and_images_must_fit(folder):
    path, _ = folder
    (path / "t10k-labels-idx1-ubyte.gz").unlink()
    (path / "t10k-labels-idx1-ubyte").write_bytes(idx(torch.zeros(7).byte()))
    with pytest.raises(errors.DataError, match="8 test images but 7 labels"):
        load("mnist", data_dir=path)


@pytest.mark.skipif(
    "REPSCOPE_DATA" not in os.environ, reason="REPSCOPE_DATA names no MNIST folder"
)
def test_real_mnist():
    data = load("mnist")
    assert data.x_train.shape == (60_000, 784)
    assert torch.bincount(data.y_test).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
