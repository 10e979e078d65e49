"""How much of a cache a sequence of so many positions commits.

Cache memory is reserved for whole contexts and committed page by page as it is written (`runtime.backend.pages`).  A head's keys of
one layer lie together, 64 to 512 bytes per position, so that a sequence commits more than it fills: the page that its last
position lies in, the one that its first shares with the head before, and what guesses have touched behind it that came to
nothing.  Positions are therefore counted in steps of `STEP_TOKENS`, and one step more.
"""

STEP_TOKENS = 64
"""At 64 bytes per position of a head a page of 4096 bytes."""


def committed_tokens(length: int, context_tokens: int) -> int:
    """What a sequence of *length* positions counts as: up to two steps more, and no more than a whole context."""
    return min(context_tokens, (-(-length // STEP_TOKENS) + 1) * STEP_TOKENS)


def cache_tokens(context_tokens: int, slots: int, shared_tokens: int) -> int:
    """Positions that all slots together may commit, where *shared_tokens* were asked for (0: a whole context for each).

    At least so many that one request may use its whole context, while each other slot has been touched: a slot that nobody
    holds may take part in a step of its neighbours.
    """
    whole = context_tokens * slots
    least = context_tokens + min(context_tokens, STEP_TOKENS) * (slots - 1)
    return min(whole, max(shared_tokens, least)) if shared_tokens else whole
