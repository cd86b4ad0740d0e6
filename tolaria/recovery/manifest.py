"""Names inside a checkpoint folder and the manifest that says what a checkpoint consists of.

A manifest may come from elsewhere, so it is bounded in size, checked field by field, and never supplies a path:
the file names of a checkpoint follow from its world size alone.
"""

import hashlib
import json
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tolaria.errors import CheckpointError

FORMAT = 2
MANIFEST_NAME = "MANIFEST.json"
MANIFEST_MAX_BYTES = 1024 * 1024
STATE_MAX_BYTES = 64 * 1024 * 1024
MAX_WORLD_SIZE = 100_000

# A checkpoint that is being written, that was found damaged, that is being deleted.
TMP_SUFFIX = ".tmp"
BAD_SUFFIX = ".bad"
TRASH_SUFFIX = ".trash"
# A file of this name, made by a person, keeps the checkpoint beside it from being deleted.
PIN_SUFFIX = ".pin"

_NAME = re.compile(r"c(0|[1-9][0-9]{0,17})-s(0|[1-9][0-9]{0,17})", re.ASCII)
_ANY_NAME = re.compile(_NAME.pattern + r"(\.(?:tmp|bad|trash)(?:-[0-9]{1,9})?)?", re.ASCII)

_Count = Annotated[int, Field(ge=0, lt=10**18)]
_Hex256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_LABEL = re.compile(r"[A-Za-z0-9_.+\-]{1,128}", re.ASCII)
_Label = Annotated[str, Field(pattern=f"^{_LABEL.pattern}$")]


def checkpoint_name(seq: int, step: int) -> str:
    """The folder name of checkpoint number ``seq``, taken after ``step`` optimizer steps."""
    return f"c{seq}-s{step}"


def parse_checkpoint_name(name: str) -> tuple[int, int] | None:
    """(seq, step) of a committed checkpoint's folder name, None for any other name."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def require_label(key: str, value: str) -> None:
    """Raise ValueError unless ``value`` may stand in a manifest as an id."""
    if not _LABEL.fullmatch(value):
        raise ValueError(f"{key}={value!r}: expected 1 to 128 letters, digits and '_', '.', '+', '-'")


def used_seq(name: str) -> int | None:
    """The seq that a folder name uses, committed or not, None for a foreign name. A seq is never used twice."""
    match = _ANY_NAME.fullmatch(name)
    return int(match[1]) if match else None


def is_leftover(name: str) -> bool:
    """True for an attempt that was not committed or a deletion that was not finished."""
    match = _ANY_NAME.fullmatch(name)
    return match is not None and (match[3] or "").startswith((TMP_SUFFIX, TRASH_SUFFIX))


def is_quarantined(name: str) -> bool:
    """True for a checkpoint that was committed once and found damaged later."""
    match = _ANY_NAME.fullmatch(name)
    return match is not None and (match[3] or "").startswith(BAD_SUFFIX)


def shard_name(rank: int) -> str:
    """The file with the tensors that ``rank`` wrote."""
    return f"shard-{rank:05d}.safetensors"


def state_name(rank: int) -> str:
    """The file with everything of ``rank`` that is not a tensor."""
    return f"state-{rank:05d}.json"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FileEntry(_Strict):
    """What a committed file must look like, byte for byte."""

    size: _Count
    sha256: _Hex256


class Manifest(_Strict):
    """The content of MANIFEST.json. ``state_digest`` covers step, replicated tensors and replicated metadata.

    ``branch``: see recovery/timeline.py. ``wal_lsn``: the last record of the log when the checkpoint was committed.
    """

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)] = FORMAT
    run_id: _Label
    generation: _Label
    seq: _Count
    step: _Count
    branch: _Count = 0
    wal_lsn: _Count = 0
    world_size: Annotated[int, Field(ge=1, le=MAX_WORLD_SIZE)]
    num_tensors: _Count
    state_digest: _Hex256
    files: dict[str, FileEntry]
    versions: dict[_Label, _Label]
    checksum: _Hex256 = "0" * 64

    def to_bytes(self) -> bytes:
        """The manifest as it is stored, with its own checksum."""
        return seal(self.model_dump(exclude={"checksum"}))


def seal(document: dict[str, Any]) -> bytes:
    """The one spelling of a manifest's content, its checksum included."""
    plain = json.dumps(document, sort_keys=True).encode()
    return json.dumps({**document, "checksum": hashlib.sha256(plain).hexdigest()}, indent=1).encode() + b"\n"


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Validate the bytes of a manifest. Raises CheckpointError that names ``where`` and the first fault."""
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "document"
        raise CheckpointError(f"{where}: {key}: {first['msg']}") from error
    ranks = range(manifest.world_size)
    expected = {name for rank in ranks for name in (shard_name(rank), state_name(rank))}
    if set(manifest.files) != expected:
        odd = sorted(set(manifest.files) ^ expected)[:3]
        raise CheckpointError(f"{where}: files: wrong names for {manifest.world_size} ranks, such as {odd}")
    if manifest.to_bytes() != raw:
        raise CheckpointError(f"{where}: checksum: it is not as it was written")
    return manifest
