"""Memory for rows that is used again: fresh memory costs more than the copy itself."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_MOST_KINDS = 256

_Kind = tuple[torch.Size, torch.dtype]


class Pool:
    """Lends tensors and takes them back; several threads may do so.

    Args:
        reuse: Whether what comes back is lent again.
    """

    def __init__(self, *, reuse: bool = True) -> None:
        self._reuse = reuse
        self._free: dict[_Kind, deque[Tensor]] = defaultdict(deque)
        self._lent: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._arriving: list[torch.cuda.Event] = []

    def copy(self, value: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return a copy of ``value`` on the CPU that nothing else writes to.

        From a GPU it is on its way when this returns: the stream that computes is
        never waited for. `settle` waits.

        Args:
            value: Any dense tensor.
            dtype: Of the copy.

        Returns:
            A contiguous tensor.
        """
        own = self._take(value.shape, dtype, pinned=value.is_cuda)
        if value.is_cuda:
            self._fetch(value.to(dtype, copy=True), own)
        else:
            own.copy_(value)
        return own

    def settle(self) -> None:
        """Wait until every copy has arrived that was asked for before."""
        waiting = self._arriving.copy()
        for event in waiting:
            event.synchronize()
        # Only now: another thread may be waiting for the same.
        for event in waiting:
            with contextlib.suppress(ValueError):
                self._arriving.remove(event)

    def renew(self, tensors: Iterable[Tensor]) -> None:
        """Lend these again, and forget what was not wanted since the last time.

        Args:
            tensors: As for `take_back`.
        """
        self._free.clear()
        self.take_back(tensors)

    def take_back(self, tensors: Iterable[Tensor]) -> None:
        """Lend these again; what is not from here is passed over.

        Args:
            tensors: Nobody reads them any more.
        """
        if len(self._free) > _MOST_KINDS:
            self._free.clear()
        for tensor in tensors:
            # What is not from here may have the number of a tensor that is gone.
            if self._lent.pop(id(tensor), None) is tensor:
                self._free[tensor.shape, tensor.dtype].append(tensor)

    def _take(self, shape: torch.Size, dtype: torch.dtype, *, pinned: bool) -> Tensor:
        try:
            own = self._free[shape, dtype].pop()
        except IndexError:
            # Memory made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                own = torch.empty(shape, dtype=dtype, pin_memory=pinned, device="cpu")
        if self._reuse:
            self._lent[id(own)] = own
        return own

    def _fetch(self, value: Tensor, own: Tensor) -> None:
        """Start to move a tensor that nobody else writes to from a GPU."""
        device = value.device
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            own.copy_(value, non_blocking=True)
            value.record_stream(stream)
            event = torch.cuda.Event()
            event.record(stream)
        self._arriving.append(event)
