"""Numbers, paths and foreign text as a terminal shows them. Pure, but for the current folder."""

import math
import os


def number(value: float | None) -> str:
    """A loss in at most six characters: 0.1234, 12.345, 123.46, 1.2e+06; "-" for None."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for limit, decimals in ((10, 4), (100, 3), (1000, 2), (10_000, 1)):
        # Decided on the rounded value, so that 9.99999 does not come out one digit too long.
        if round(size, decimals) < limit:
            return f"{value:.{decimals}f}"
    return f"{value:.0e}"


def percent(value: float | None) -> str:
    """A share in [0, 1] as 93.4%; "-" for None."""
    return "-" if value is None else f"{value:.1%}"


def duration(seconds: float) -> str:
    """Seconds in words of the right size: 0.8 s, 42 s, 1 min 42 s, 3 h 7 min."""
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def short_duration(seconds: float) -> str:
    """Seconds in at most six characters: 0.8s, 42.1s, 102s, 16m40s, 3h07m."""
    if round(seconds, 1) < 100:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 600:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 100:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"


def counted(amount: int, noun: str) -> str:
    """ "1 step", "2 steps", "12,000 steps"."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def large(amount: float) -> str:
    """An amount with three digits and its power of ten: 512, 138 k, 1.18 M, 33.2 G, 2 T."""
    size, unit = float(amount), ""
    for following in "kMGTPE":
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, following
    return f"{size:.3g} {unit}".rstrip()


def printable(text: str, encoding: str) -> str:
    """``text`` on one line, in what ``encoding`` can show, without anything that steers a terminal.

    Reasons and names come from policies and users: an escape sequence in them must not reach the terminal.
    """
    flat = "".join(char if char.isprintable() else " " for char in text)
    return flat.encode(encoding, "replace").decode(encoding)


def short_path(path: str) -> str:
    """A path as a person would type it here: relative where it lies below the current folder."""
    here = os.getcwd()
    return os.path.relpath(path, here) if path.startswith(here + os.sep) else path
