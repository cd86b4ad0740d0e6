"""A run seen from outside: its files as facts, without torch and without touching the run.

`files`: what a run directory holds. Everything here only reads; a run that lives goes on writing meanwhile.
"""

from tolaria.view.files import RunFiles, find_runs, open_files

__all__ = ["RunFiles", "find_runs", "open_files"]
