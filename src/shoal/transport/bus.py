"""The `Bus` port: keyed messages between nodes, whatever carries them.

Keys are slash-separated chunks; a pattern may use `*` (one chunk) and `**` (any number of chunks, also none).
Semantics that both implementations keep (the contract suite holds them to it):

- `put` reaches every subscription that matches at this moment, once, in order per sender and key; it promises nothing
  to anybody who is disconnected (ADR 4: state that must last is resent until the application's ACK).
- `deliver` and `reply` run on a thread of the bus and must return at once: hand over to a queue of your own.
- `alive` and `watch` are a hint of death, quick where it can be: a process that ends is told of at once, one that freezes or
  is cut off after a while or never, and a link that fails for a moment looks like a death.  Whoever decides asks for more.
- Closing a subscription, an answer or the bus twice is harmless; after closing nothing is delivered.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

import msgspec


class Lane(IntEnum):
    """What a message competes with; smaller goes first."""

    DECODE = 1
    CONTROL = 2
    PREFILL = 3
    BULK = 6


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One message as it arrived."""

    key: str
    payload: bytes


class Closable(Protocol):
    """Something that holds resources of a bus."""

    def close(self) -> None:
        """Give them back; harmless when repeated."""
        ...


class Bus(Protocol):
    """Publish, subscribe and ask; see the module's docstring for what each implementation keeps."""

    def put(self, key: str, payload: bytes, *, lane: Lane = Lane.CONTROL) -> None:
        """Send *payload* to whoever subscribes to *key* now."""
        ...

    def subscribe(self, pattern: str, deliver: Callable[[Sample], None]) -> Closable:
        """Call *deliver* for each sample whose key matches *pattern*."""
        ...

    def answer(self, pattern: str, reply: Callable[[Sample], bytes]) -> Closable:
        """Answer queries whose key matches *pattern*; an exception in *reply* becomes the asker's error."""
        ...

    def query(self, key: str, payload: bytes, *, timeout_s: float) -> bytes:
        """Ask whoever answers *key*; raises NodeUnreachableError when nobody does within *timeout_s*."""
        ...

    def alive(self, key: str) -> Closable:
        """Be alive under *key*, which nobody else uses, until closed or until this bus or process is no more."""
        ...

    def watch(self, pattern: str, gone: Callable[[str], None]) -> Closable:
        """Call *gone* with each key matching *pattern* that was alive and is not any more, as far as can be seen from here."""
        ...

    def close(self) -> None:
        """End every subscription and answer; harmless when repeated."""
        ...
