"""Seconds and bytes as people read them."""

UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "KB"))


def size(count_bytes: float) -> str:
    """1_500_000 -> "1.5 MB"."""
    for unit, name in UNITS:
        if count_bytes >= unit:
            return (
                f"{count_bytes / unit:.3g} {name}" if count_bytes < 999.5 * unit else f"{count_bytes / unit:.0f} {name}"
            )
    return f"{count_bytes:.0f} B"


def duration(time_s: float) -> str:
    """0.0482 -> "48.2 ms", 7.5 -> "7.50 s"."""
    return f"{time_s:.2f} s" if time_s >= 1 else f"{time_s * 1e3:.3g} ms" if time_s < 0.9995 else "1.00 s"


def share(part: float, whole: float) -> str:
    """A part in percent; of nothing it is 0."""
    return f"{100 * part / whole if whole else 0:.0f} %"
