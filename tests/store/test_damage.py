"""Damaged stores: what was acknowledged, or an error; never other numbers."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from repscope import store
from repscope.errors import CorruptSegment, FormatTooNew, NotAStore
from repscope.snapshot import Snapshot


@pytest.fixture
def path(create, snapshot, tiny):
    """Steps 0 to 19 in one segment of small chunks, 20 to 29 in another."""
    w = create(seed=1)
    for step in range(30):
        w.append(snapshot(step))
        if step in (19, 29):
            w.commit()
    w.close()
    assert len(list((w.path / "segments").iterdir())) == 2
    return w.path


_tick = iter(range(10**9, 10**12))


def overwrite(file, data):
    """Write damage, and let the clock move on as it does in life."""
    file.write_bytes(data)
    os.utime(file, ns=(next(_tick), next(_tick)))


# -- no store ----------------------------------------------------------------
def test_paths_that_hold_no_store(tmp_path):
    with pytest.raises(NotAStore, match="does not exist"):
        store.open(tmp_path / "nowhere")
    (tmp_path / "file.h5").write_text("hello")
    with pytest.raises(NotAStore, match="is a file"):
        store.open(tmp_path / "file.h5")
    with pytest.raises(NotAStore, match="no FORMAT"):
        store.open(str(tmp_path))


def test_a_store_without_its_manifest(path):
    (path / "MANIFEST").unlink()
    with pytest.raises(NotAStore, match="no MANIFEST"):
        store.open(path)


@pytest.mark.parametrize("text", ["", "something else", "RepScope store\nversion x\n"])
def test_a_format_that_says_something_else(path, text):
    (path / "FORMAT").write_text(text)
    with pytest.raises(NotAStore, match="FORMAT does not say"):
        store.open(path)


def test_a_newer_format(path):
    (path / "FORMAT").write_text("RepScope store\nversion 12\n")
    with pytest.raises(FormatTooNew, match="format 12, this RepScope knows up to 1"):
        store.open(path)


def test_pipes_do_not_make_the_reader_wait(path):
    segment = path / "segments" / "00000001.h5"
    segment.unlink()
    os.mkfifo(segment)
    with pytest.raises(CorruptSegment):
        store.open(path).read("fc1")
    (path / "MANIFEST").unlink()
    os.mkfifo(path / "MANIFEST")
    with pytest.raises(NotAStore):
        store.open(path)


# -- the manifest ------------------------------------------------------------
def test_a_tail_torn_at_any_byte_hides_only_the_last_frame(create, snapshot, same):
    w = create()
    w.append(snapshot(0))
    w.commit()
    good = (w.path / "MANIFEST").read_bytes()
    w.append(snapshot(1))
    w.commit()
    whole = (w.path / "MANIFEST").read_bytes()
    for length in range(len(good), len(whole)):
        (w.path / "MANIFEST").write_bytes(whole[:length])
        run = store.open(w.path)
        assert run.steps == [0]
        if length % 50 == 0:
            same.tensor(run.read("fc1"), snapshot(0).streams["outputs", "fc1"])
    (w.path / "MANIFEST").write_bytes(whole + b"RSF1 and rubbish after it")
    assert store.open(w.path).steps == [0, 1]


def test_any_changed_byte_of_the_last_frame_hides_it(create, snapshot):
    w = create()
    w.append(snapshot(0))
    w.commit()
    start = (w.path / "MANIFEST").stat().st_size
    w.append(snapshot(1))
    w.commit()
    whole = (w.path / "MANIFEST").read_bytes()
    for at in range(start, len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        (w.path / "MANIFEST").write_bytes(damaged)
        assert store.open(w.path).steps == [0]


def test_a_frame_out_of_order_is_damage(path):
    data = (path / "MANIFEST").read_bytes()
    second = data.index(b"RSF1", 4)
    (path / "MANIFEST").write_bytes(data[:second] * 2 + data[second:])
    with pytest.raises(CorruptSegment, match="damaged at byte"):
        store.open(path)


def test_a_manifest_cut_inside_its_header(path):
    (path / "MANIFEST").write_bytes((path / "MANIFEST").read_bytes()[:30])
    with pytest.raises(NotAStore, match="no whole frame"):
        store.open(path)


# -- segments ----------------------------------------------------------------
def chunk_bytes(run):
    """Yield ``key, file, first byte, end`` of every chunk in the store."""
    for batch in run._catalog._batches:
        for key, parts in batch.parts.items():
            for stored in parts:
                size = stored.part.chunk_rows * stored.part.row_bytes
                for offset, _ in stored.part.chunks:
                    yield key, stored.path, offset, offset + size


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_byte_in_any_chunk_is_never_read_as_data(path, place, tmp_path):
    """Whatever byte changes, padding included, the stream it belongs to says so."""
    chunks = list(chunk_bytes(store.open(path)))
    assert len(chunks) > 20
    for key, file, first, end in chunks:
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[first + round(place * (end - first - 1))] ^= 0x10
        overwrite(file, damaged)
        with pytest.raises(CorruptSegment, match="other bytes"):
            read_stream(store.open(path), key)
        overwrite(file, whole)


def read_stream(run, key):
    target, layer = key
    if target == "scalars":
        return run.scalars()
    if target == "labels":
        return [run.labels(step) for step in run.steps]
    return list(run.snapshots(target=target, layers=[layer]))


def test_any_changed_byte_of_a_segment_leaves_true_numbers_or_an_error(
    path, snapshot, same
):
    file = path / "segments" / "00000000.h5"
    whole = file.read_bytes()
    run, refused = store.open(path), 0
    for at in range(0, len(whole), 23):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        overwrite(file, damaged)
        for step in (0, 7, 19):
            try:
                rows = run.read("fc1", step)
            except CorruptSegment:
                refused += 1
            else:
                same.tensor(rows, snapshot(step).streams["outputs", "fc1"])
    assert refused > 20


def test_the_message_names_layer_and_steps_and_the_rest_still_reads(
    path, snapshot, same
):
    run = store.open(path)
    _, file, first, _ = next(c for c in chunk_bytes(run) if c[0][1] == "fc1")
    damaged = bytearray(file.read_bytes())
    damaged[first] ^= 1
    overwrite(file, damaged)
    with pytest.raises(
        CorruptSegment,
        match=r"00000000\.h5 holds other bytes.*outputs of layer 'fc1' at steps 0, 1,",
    ):
        run.read("fc1", 0)
    for layer, step in (("fc1", 19), ("fc1", 25), ("fc2", 0)):
        same.tensor(run.read(layer, step), snapshot(step).streams["outputs", layer])


def test_damage_after_a_first_good_read_is_seen(path):
    run = store.open(path)
    run.read("fc1", 3)
    file = path / "segments" / "00000000.h5"
    for _, _, first, _ in chunk_bytes(run):
        damaged = bytearray(file.read_bytes())
        damaged[first] ^= 1
        overwrite(file, damaged)
        break
    with pytest.raises(CorruptSegment):
        list(run.snapshots())


@pytest.mark.parametrize("how", ["missing", "shorter", "longer", "swapped", "gone"])
def test_a_segment_that_is_not_the_one_that_was_written(path, how, snapshot, same):
    first, second = (path / "segments" / f"0000000{i}.h5" for i in (0, 1))
    if how == "missing":
        first.unlink()
    elif how == "shorter":
        overwrite(first, first.read_bytes()[:-1])
    elif how == "longer":
        overwrite(first, first.read_bytes() + b"x")
    elif how == "swapped":
        shutil.copy(second, first)
    else:
        shutil.rmtree(first.parent)
    run = store.open(path)  # opens, whatever is damaged
    assert run.steps == list(range(30))
    words = r"\.h5 .*outputs of layer 'fc1' at steps 0 to 19 \(20 of them\)"
    with pytest.raises(CorruptSegment, match=words):
        run.read("fc1", 5)
    with pytest.raises(CorruptSegment, match="the labels at"):
        run.labels(5)
    with pytest.raises(CorruptSegment, match="scalar 'loss' at"):
        run.scalars()
    if how != "gone":
        same.tensor(run.read("fc1", 25), snapshot(25).streams["outputs", "fc1"])


def test_zeros_in_place_of_a_chunk_are_not_zeros(create):
    """A hole, as a power cut or a bad copy leaves it."""
    w = create()
    w.append(Snapshot(0, {("outputs", "a"): torch.ones(300, 300)}))
    w.close()
    run = store.open(w.path)
    _, file, first, end = next(chunk_bytes(run))
    data = bytearray(file.read_bytes())
    data[first:end] = bytes(end - first)
    overwrite(file, data)
    with pytest.raises(CorruptSegment, match="at step 0 cannot"):
        run.read("a")
