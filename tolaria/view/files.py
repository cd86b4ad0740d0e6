"""The files of a run directory, read while the run may be writing them.

LOCK             who trains here                       tolaria/rundir/ownership.py
config.toml      as it was started                     tolaria/options.py
events.jsonl     what happened, rank 0's lines and those of the others, one JSON object a line
metrics.jsonl    numbers of steps
status.json      how it is now, rewritten about once a second, and a last time at the end
summary.json     how it ended
"""

import fcntl
import json
import os
import struct
import tomllib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from tolaria.errors import RunDirError
from tolaria.rundir.ownership import FENCE_NAME, LOCK_NAME
from tolaria.view.tail import parsed

MAX_FILE_BYTES = 64 * 1024 * 1024
_FLOCK = "@hhqqi0q"
_ASK_FOR_LOCK = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class RunFiles:
    """One run directory. Local, reads only; methods raise RunDirError for what cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.resolve().name

    @property
    def alive(self) -> bool:
        """Whether a process holds the run's lock on this machine; `host` says which machine that would be."""
        return self.holder is not None

    @property
    def holder(self) -> int | None:
        """The process that holds the run's lock on this machine, None for nobody here."""
        try:
            with (self.path / LOCK_NAME).open("rb") as file:
                # Asked for, not taken: a start that wants the lock at this moment must get it.
                found = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, _ASK_FOR_LOCK))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(self.path / LOCK_NAME, error) from error
        return int(found[4]) if found[0] != fcntl.F_UNLCK else None

    @property
    def host(self) -> str:
        """The machine of the last start's rank 0; empty where it is not told."""
        try:
            words = (self.path / LOCK_NAME).read_bytes()[:300].decode(errors="replace").split()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise _unreadable(self.path / LOCK_NAME, error) from error
        return words[1] if len(words) == 2 else ""

    def config(self) -> dict[str, Any]:
        """The configuration of the last start, empty where there is none. Raises RunDirError for what is no TOML."""
        path = self.path / "config.toml"
        try:
            return tomllib.loads(path.read_text(errors="replace"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise _unreadable(path, error) from error
        except tomllib.TOMLDecodeError as error:
            raise RunDirError(f"{path}: not valid TOML ({error})") from error

    def events(self, kinds: Container[str] | None = None) -> Iterator[dict[str, Any]]:
        """The run's events in the order of writing, of all ranks; only of these kinds where given."""
        for record in _lines(self.path / "events.jsonl"):
            if kinds is None or record.get("kind") in kinds:
                yield record

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The numbers of steps, in the order of writing; a return of the run goes back in step."""
        return _lines(self.path / "metrics.jsonl")

    def status(self) -> dict[str, Any] | None:
        """How the run is, or was when it last said so; None before the first time."""
        return _document(self.path / "status.json")

    def summary(self) -> dict[str, Any] | None:
        """How the run ended; None as long as it has not."""
        return _document(self.path / "summary.json")


def open_files(path: str | os.PathLike[str]) -> RunFiles:
    """The files of the run at ``path``. Raises RunDirError, naming the path, for what is no run directory."""
    folder = Path(path)
    if not folder.is_dir():
        raise RunDirError(f"{folder}: no such directory; `tolaria runs` lists the runs there are")
    if not _is_run(folder):
        raise RunDirError(f"{folder}: not a run directory; `tolaria runs` lists the runs there are")
    return RunFiles(folder)


def find_runs(root: str | os.PathLike[str]) -> list[RunFiles]:
    """All run directories right below ``root``, by name; empty where there are none."""
    folder = Path(root)
    try:
        below = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error
    return [RunFiles(path) for path in below if _is_run(path)]


def _is_run(path: Path) -> bool:
    return (path / FENCE_NAME).exists() or (path / "events.jsonl").exists()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    return  # still being written
                record = parsed(raw)
                if record is not None:
                    yield record
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(path, error) from error


def _document(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise RunDirError(f"{path}: larger than {MAX_FILE_BYTES} bytes, not one of Tolaria's")
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise RunDirError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise RunDirError(f"{path}: expected a JSON object")
    return document


def _unreadable(path: Path, error: OSError) -> RunDirError:
    return RunDirError(f"{path}: cannot be read ({error.strerror})")
