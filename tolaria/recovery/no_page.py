"""What stands in for the page where there is none."""

from typing import TypeAlias

from tolaria.recovery.page import MAX_LEVEL, Page, Phase


class NoPage:
    """Stands in where no page can be mapped: levels of this rank alone, which the fence carries to the others."""

    def __init__(self) -> None:
        self._level = 0
        self._reason = ""
        self._told = (0, 0, 0.0)

    def tell(self, turn: int, flags: int, loss: float) -> None:
        """As `Page.tell`."""
        self._told = (turn, flags, loss)

    def told(self, turn: int) -> list[tuple[int, float]] | None:
        """As `Page.told`, of this rank alone."""
        return [self._told[1:]] if self._told[0] == turn else None

    def enter(self, phase: Phase, step: int) -> None:
        """Nobody is watching."""

    def raise_level(self, level: int, reason: str) -> None:
        """As `Page.raise_level`."""
        if not 1 <= level <= MAX_LEVEL:
            raise ValueError(f"emergency level {level}: expected 1 to {MAX_LEVEL}")
        if level > self._level:
            self._level, self._reason = level, reason

    def level(self) -> int:
        """As `Page.level`."""
        return self._level

    def reason(self) -> str:
        """As `Page.reason`."""
        return self._reason

    def clear(self, upto: int = MAX_LEVEL) -> None:
        """As `Page.clear`."""
        if self._level <= upto:
            self._level, self._reason = 0, ""

    def close(self) -> None:
        """Nothing to unmap."""


AnyPage: TypeAlias = Page | NoPage
