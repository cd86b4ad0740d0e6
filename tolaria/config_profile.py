"""Configuration of the profiler."""

from dataclasses import dataclass

from tolaria.config_fields import ONE_OR_MORE, doc, require, require_range

ALL_RANKS = "all"


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Traces of some steps, for the run's folder ``profile/``."""

    enabled: bool = doc(False, "trace some steps with torch.profiler: traces and summary.txt in <run>/profile/")
    after_steps: int = doc(10, "optimizer steps of this start before the first traced one; the last of them warms up")
    steps: int = doc(10, "optimizer steps traced, and the first boundary in or after them")
    ranks: str = doc("0", "ranks traced: all, or numbers with commas between")
    details: bool = doc(False, "shapes and Python stacks of every operator; slows the traced steps down")
    memory: bool = doc(True, "on CUDA: a record of every allocation in the traced steps as well")

    def __post_init__(self) -> None:
        require_range(self, "profile", ONE_OR_MORE, "after_steps", "steps")
        words = [word.strip() for word in self.ranks.split(",")]
        ok = self.ranks == ALL_RANKS or all(word.isascii() and word.isdigit() for word in words)
        require(ok, "profile.ranks", self.ranks, "all, or numbers with commas between, as 0,3")

    def traces(self, rank: int) -> bool:
        """Whether this rank is to be traced."""
        return self.enabled and (self.ranks == ALL_RANKS or rank in map(int, self.ranks.split(",")))
