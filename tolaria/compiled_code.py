"""Compiled code that outlives a start: one file beside the run, unpacked into a folder of this start's own.

    <folder of the run>/.compile_cache/<torch and machine>.pack  ->  TMPDIR/tolaria-code-<run>  -> torch.compile
                          after every compile that made something new  <-

torch trusts its cache: with files cut short in it, measured, it failed to compile, or took other kernels without a
word, so that the loss had other last digits. So what is kept is checked as a whole before torch sees any of it. It is
code that is run, and torch unpickles parts of it: only this user may write the file, and no other user's is read.
"""

import hashlib
import io
import os
import platform
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._dynamo.callback import callback_handler, on_compile_end, on_compile_start

from tolaria.config import Config
from tolaria.dist import World
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.goodput import Ledger

FOLDER = ".compile_cache"
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_MAGIC = b"tolaria compiled code 1\n"
_HASH_BYTES = hashlib.sha256().digest_size


@dataclass
class CompiledCode:
    """What torch.compile has in ``work``, and the file that keeps it. Only the first rank of a node writes."""

    pack: Path
    work: Path
    writes: bool
    events: EventLog
    _kept: frozenset[str] = field(default=frozenset(), init=False)

    def take_up(self) -> None:
        """Fill ``work`` with what the file holds; with nothing if there is none or it is damaged. Local.

        Raises OSError where ``work`` cannot be made.
        """
        if self.work.is_symlink() or self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(mode=0o700)
        try:
            body = _read(self.pack)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self.events.emit("compile_cache_refused", "warning", path=str(self.pack), reason=str(error))
            return
        with tarfile.open(fileobj=io.BytesIO(body)) as archive:
            archive.extractall(self.work, filter="data")
        self._kept = self._files()

    def keep(self) -> None:
        """Write the file anew if torch has compiled something since. Local; a failure is told, and training goes on."""
        files = self._files()
        if not self.writes or files <= self._kept:
            return
        self._kept = files
        try:
            _private_folder(self.pack.parent)
            _write(self.pack, _archive(self.work, files))
        except OSError as error:
            self.events.emit("compile_cache_not_kept", "warning", path=str(self.pack), reason=str(error))

    def _files(self) -> frozenset[str]:
        found = (path for path in self.work.rglob("*") if path.is_file() and path.suffix not in (".lock", ".tmp"))
        return frozenset(str(path.relative_to(self.work)) for path in found)


@contextmanager
def compiled_code(
    config: Config, run: Path, run_id: str, world: World, events: EventLog
) -> Iterator[CompiledCode | None]:
    """While it lasts torch.compile keeps its code as ``compile.cache`` says; None where that is torch's own affair.

    ``run``: the run directory. Collective: all ranks enter it together.
    """
    setting = config.compile.cache
    if setting == "torch" or not (config.compile.enabled or config.optim.compile_step):
        yield None
        return
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir, temporary_cache_dir  # noqa: PLC0415 - slow

    # torch sets the variable itself, to its default; anything else is the user's.
    own = os.environ.get(VARIABLE, default_cache_dir()) != default_cache_dir()
    if world.peers.max(torch.tensor([int(own)])):
        yield None
        return
    folder = run.parent / FOLDER if setting == "run" else Path(setting)
    work = Path(tempfile.gettempdir()) / f"tolaria-code-{run_id}"
    code = CompiledCode(folder / f"{_machine(world.device)}.pack", work, world.local_rank == 0, events)
    failure = ""
    if code.writes:
        try:
            code.take_up()
        except OSError as error:
            failure = str(error)
            events.emit("compile_cache_refused", "warning", path=str(work), reason=failure)
    try:
        if not world.peers.agree(not failure):
            yield None
            return
        with temporary_cache_dir(str(work)):
            yield code
    finally:
        if code.writes:
            shutil.rmtree(work, ignore_errors=True)


def _machine(device: torch.device) -> str:
    """A name that differs where code for one machine may not run on the other."""
    facts = [torch.__version__, platform.python_version(), platform.machine(), torch.backends.cpu.get_cpu_capability()]
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        # The same line for every core, but for its clock.
        facts += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    if device.type == "cuda":
        facts += [torch.cuda.get_device_name(device), str(torch.cuda.get_device_capability(device))]
    return f"torch-{torch.__version__}-{device.type}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


def _private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(folder)


def _require_private(path: Path) -> None:
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path}: holds code that is run, but others than this user may write it")


def _archive(folder: Path, files: frozenset[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in sorted(files):
            archive.add(folder / name, arcname=name)
    return buffer.getvalue()


def _write(path: Path, body: bytes) -> None:
    # Not synced: after a power failure the hash tells.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".new", delete=False) as file:
        try:
            file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            file.close()
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


def _read(path: Path) -> bytes:
    for each in (path, path.parent):
        _require_private(each)
    data = path.read_bytes()
    start = len(_MAGIC) + _HASH_BYTES
    body = data[start:]
    if data[:start] != _MAGIC + hashlib.sha256(body).digest():
        raise ValueError(f"{path}: damaged; everything is compiled anew")
    return body


@contextmanager
def compiling_seen(ledger: Ledger) -> Iterator[None]:
    """Inside, whatever torch compiles, also by itself in the middle of a step, is compile for the clock."""
    compiling = ledger.inside("compile")

    def begin(_: object) -> None:
        compiling.__enter__()

    def end(_: object) -> None:
        compiling.__exit__(None, None, None)

    on_compile_start(begin)
    on_compile_end(end)
    try:
        yield
    finally:
        for callbacks, own in ((callback_handler.start_callbacks, begin), (callback_handler.end_callbacks, end)):
            if own in callbacks:  # torch._dynamo.reset takes all of them away
                callbacks.remove(own)
