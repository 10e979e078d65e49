"""How much went through a bus, for metrics."""

import threading

import msgspec


class BusStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the bus was opened; bytes are payload bytes."""

    messages_sent: int = 0
    bytes_sent: int = 0
    messages_received: int = 0
    """Delivered to a subscription; one message counts once for each of them."""
    bytes_received: int = 0
    queries_sent: int = 0
    queries_failed: int = 0
    """Of the sent ones: no answer in time, or an error as the answer."""
    queries_answered: int = 0
    deliver_errors: int = 0
    """Callbacks that raised; the message is lost to that subscription."""


class Tally:
    """Adds up from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(BusStats.__struct_fields__, 0)

    def add(self, **by: int) -> None:
        """Raise the named counts."""
        with self._lock:
            for name, amount in by.items():
                self._counts[name] += amount

    def read(self) -> BusStats:
        """All counts at one moment."""
        with self._lock:
            return BusStats(**self._counts)
