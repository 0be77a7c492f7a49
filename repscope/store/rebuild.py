"""Make a manifest again from what is left of it and from what the segments carry.

Every segment ends in a copy of what its frame says and in the checksums of its chunks.
So a manifest that was damaged or deleted costs nothing but the frames that name no
segment: notes that no later commit repeated, and whether the run was closed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repscope.errors import CorruptSegment
from repscope.store import files, manifest, schema, segment, wal
from repscope.store.index import Part, from_spans

Frame = dict[str, Any]
_MOST_LOOKS = 1000


def carried(file: Path) -> tuple[int, Frame] | None:
    """Return what a segment says about itself, or None if that is damaged.

    Args:
        file: A segment.

    Returns:
        The number of its frame; and ``run``, ``frame``, ``place`` (among the segments
        of that frame), ``last`` (whether it is the last of them) and ``segment``, its
        entry there.
    """
    try:
        data = file.read_bytes()
        at, (body, seq, end) = _last_frame(data)
        parts = [Part.from_json(part) for part in body["parts"]]
        chunks = [chunk for part in parts for chunk in part.chunks]
        first, size = body[segment.CRC32], 4 * (len(chunks) + 1)
        crcs = np.frombuffer(data[first : first + size], "<u4").tolist()
        if segment.seal(data[at:end], crcs[:-1]) != data[first : first + size]:
            return None
        for chunk, crc in zip(chunks, crcs, strict=False):
            chunk[1] = crc
        entry = {"bytes": len(data), "parts": [part.to_json() for part in parts]}
        schema.check(file, {**body["frame"], "segments": [{"number": 0, **entry}]})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    number = int(file.stem) if file.stem.isdigit() else -1
    return seq, {**body, "segment": {"number": number, **entry}}


def _last_frame(data: bytes) -> tuple[int, tuple[Frame, int, int]]:
    """Return where the last frame in a segment starts, and the frame.

    Raises:
        ValueError: If there is none.
    """
    at = len(data)
    for _ in range(_MOST_LOOKS):  # notes in the frame may spell the magic too
        at = data.rfind(manifest.MAGIC, 0, at + 3)
        if at < 0:
            break
        try:
            found = manifest.frame_at(data, at)
        except ValueError:
            continue
        return at, found
    raise ValueError("no whole frame")


def from_segments(folder: Path, *, skip: set[int]) -> Iterable[tuple[int, Frame]]:
    """Return the frames that the segments of a store carry, those that are whole.

    Args:
        folder: ``segments/``.
        skip: Numbers of segments not to look at.

    Returns:
        Numbers and frames, which have one more field, ``run``: what was known of the
        run. Of a commit that was tried twice, the later try counts.
    """
    frames: dict[int, Frame] = {}
    tried: list[Frame] = []
    for file in sorted(folder.glob("[0-9]*.h5")):
        if not file.stem.isdigit() or int(file.stem) in skip or not file.is_file():
            continue
        if (found := carried(file)) is None:
            tried = []
            continue
        seq, body = found
        tried = [*(tried if body["place"] else []), body]
        if body["place"] == len(tried) - 1 and body["last"]:
            segments = [each["segment"] for each in tried]
            frames[seq] = {**body["frame"], "segments": segments, "run": body["run"]}
    return frames.items()


def unnamed(path: Path, frames: Sequence[Frame]) -> dict[int, Frame]:
    """Return what whole segments carry beyond the end of a manifest.

    A writer died before it wrote their frame, or their frames were damaged since.

    Args:
        path: The store.
        frames: What its manifest says.
    """
    return {
        seq: frame
        for seq, frame in from_segments(path / "segments", skip=_named(frames))
        if seq >= len(frames)
        and _is_news(path, frames, seq, frame)
        and is_sound(path, frame)
    }


def _named(frames: Iterable[Frame]) -> set[int]:
    """Return the numbers of the segments that frames name."""
    return {e["number"] for frame in frames for e in frame.get("segments", ())}


def _is_news(path: Path, frames: Sequence[Frame], seq: int, frame: Frame) -> bool:
    """Return whether a frame has rows that are nowhere else."""
    low, high = frame.get("replaces", (1, 0))
    replaced = _named(frames[low : high + 1])
    if replaced and all(manifest.locate(path, n).exists() for n in replaced):
        return False  # a merge that did not come to its end
    # An earlier try of a commit has fewer records than the log.
    return len(from_spans(frame["steps"])) >= len(wal.read(path, seq)[0])


def is_sound(path: Path, frame: Mapping[str, Any]) -> bool:
    """Return whether every chunk that a frame names has its checksum.

    Args:
        path: The store.
        frame: A frame.
    """
    for entry in frame["segments"]:
        try:
            data = manifest.locate(path, entry["number"]).read_bytes()
        except OSError:
            return False
        for part in (Part.from_json(part) for part in entry["parts"]):
            for offset, crc in part.chunks:
                if zlib.crc32(data[offset : offset + part.chunk_bytes]) != crc:
                    return False
    return True


def from_manifest(path: Path) -> dict[int, Frame]:
    """Return every whole frame in what there is of a manifest, also behind damage."""
    frames: dict[int, Frame] = {}
    if not (file := path / "MANIFEST").is_file():
        return frames
    data, at = file.read_bytes(), 0
    while (at := data.find(manifest.MAGIC, at)) >= 0:
        try:
            body, seq, at = manifest.frame_at(data, at)
            schema.check(path, body)
        except (ValueError, CorruptSegment):
            at += 1
            continue
        frames.setdefault(seq, body)
    return frames


def rebuild(path: Path) -> dict[str, Any]:
    """Write ``MANIFEST`` anew; the old one goes to ``quarantine/``.

    Args:
        path: A store, whose lock is held.

    Returns:
        What was found, as JSON: frames kept and restored, and numbers that are lost.

    Raises:
        CorruptSegment: If nothing is left to make it of.
    """
    kept = from_manifest(path)
    restored = {
        seq: frame
        for seq, frame in from_segments(path / "segments", skip=_named(kept.values()))
        if seq not in kept and _is_news(path, [], seq, frame)
    }
    everything = {**restored, **kept}
    _recall(path, everything)
    if not everything:
        raise CorruptSegment(
            f"{path} has no whole frame in MANIFEST and none in its segments: nothing "
            "tells which rows belong to which step. Restore it from a copy"
        )
    about, frames = _in_order(everything)
    known = {0, *everything, *(seq for seq, _ in about["rewinds"])}
    for low, high in _merges(everything):
        known |= set(range(low, high + 1))
    lost = sorted(set(range(max(everything))) - known)
    found = {"kept": len(kept), "restored": len(restored), "lost_frames": lost}
    meta = about["meta"]
    meta["rebuilt"] = [*meta.get("rebuilt", []), found]
    frames.append({"meta": meta, "closed": frames[-1].get("closed", False)})
    data = [manifest.encode(seq, body) for seq, body in enumerate(frames)]
    temp = path / ".tmp-MANIFEST-rebuilt"
    files.discard(temp)
    files.write_new(temp, data)
    if (old := path / "MANIFEST").is_file():
        name = files.set_aside(path, "MANIFEST")
        files.write_new(path / "quarantine" / name, [old.read_bytes()])
    # Leftovers carry the old numbers, which mean nothing from now on.
    named = _named(frames)
    for file in sorted((path / "segments").glob("[0-9]*.h5")):
        if file.stem.isdigit() and int(file.stem) not in named:
            files.set_aside(path, file.name, file=file)
    _keep_log(path, above=max(everything), now=len(frames))
    temp.rename(path / "MANIFEST")
    files.sync_directory(path)
    return found


def _recall(path: Path, everything: dict[int, Frame]) -> None:
    """Let the last frame with segments say what was known of the run."""
    for seq in sorted(everything, reverse=True):
        frame = everything[seq]
        if entries := frame.get("segments"):
            told = carried(manifest.locate(path, entries[-1]["number"]))
            if told is not None:
                everything[seq] = {"run": told[1]["run"], **frame}
                return


def _in_order(everything: Mapping[int, Frame]) -> tuple[dict[str, Any], list[Frame]]:
    """Return what is known of a run, and its frames in the order of their records.

    Merged batches come where the ones they replaced were, so that no frame refers to
    the number of another. A rewind that they span comes before them: what it hid of
    their rows they say themselves.
    """
    about: dict[str, Any] = {}
    merges = _merges(everything)
    placed: list[tuple[float, int, Frame]] = []
    for seq, frame in sorted(everything.items()):
        frame = dict(frame)
        about = manifest.follow(frame.pop("run", about), frame, seq)
        if seq:
            frame.pop("meta", None)  # the last frame will have all notes that hold
        low, high = span = frame.pop("replaces", [seq, seq])
        if any(a <= low and high <= b and [a, b] != span for a, b in merges):
            for field in ("steps", "tags", "segments", "hidden", "level"):
                frame.pop(field, None)  # its rows are in the merged batch
        placed.append((_place(seq, merges) if "rewind" in frame else low, seq, frame))
    if 0 not in everything:
        placed.append((-1, 0, {"created": about["created"], "meta": about["meta"]}))
    placed += [
        (_place(seq, merges), seq, {"rewind": step})
        for seq, step in about["rewinds"]
        if seq not in everything
    ]
    return about, [frame for *_, frame in sorted(placed, key=lambda p: p[:2])]


def _merges(everything: Mapping[int, Frame]) -> list[list[int]]:
    return [frame["replaces"] for frame in everything.values() if "replaces" in frame]


def _place(rewind: int, merges: list[list[int]]) -> float:
    """Return where a rewind is in the order of the records."""
    spanned = [low - 0.5 for low, high in merges if low < rewind <= high]
    return min(spanned, default=rewind)


def _keep_log(path: Path, *, above: int, now: int) -> None:
    """Let the log follow the new manifest, if it followed the old one."""
    logs = [log for log in (path / "wal").glob("[0-9]*.log") if log.stem.isdigit()]
    for log in sorted(logs)[-1:]:
        if int(log.stem) > above:
            log.rename(manifest.locate(path, now, log=True))
