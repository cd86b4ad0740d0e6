"""The keys that an audit has, and what they say of a signed frame."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from tolaria.errors import MessageRejected
from tolaria.leyline.framing import Frame, FrameKind, KeyRing, load_key_file, open_frame
from tolaria.orders.desk import KEY_NAME
from tolaria.tamiyo.line import KEYS_NAME

Proof: TypeAlias = Literal["verified", "no key", "WRONG", ""]
"""verified: signed by one of the keys, and not altered since; "": nothing there is signed."""

_UNKNOWN = ("unknown_key",)


class Keys:
    """Rings of keys; a frame is verified by whichever has the one that signed it."""

    def __init__(self, rings: Sequence[KeyRing]) -> None:
        self._rings = tuple(rings)

    def judge(self, raw: bytes, kind: FrameKind) -> tuple[Proof, Frame | None, str]:
        """What the keys say of a frame, the frame if it is verified, and what is wrong with it otherwise."""
        why = "no key is here to verify it with"
        for ring in self._rings:
            try:
                return "verified", open_frame(raw, ring, kind), ""
            except MessageRejected as error:
                if error.code not in _UNKNOWN:
                    return "WRONG", None, f"{error.code}: {error}"
                why = str(error)
        return "no key", None, why


def keys_for(run: Path, key_files: Sequence[str]) -> Keys:
    """The keys named, and those that lie in the run's directory. Raises ConfigError for a file that is no key file."""
    own = [run / name for name in (KEY_NAME, KEYS_NAME)]
    return Keys([load_key_file(path) for path in (*map(Path, key_files), *(path for path in own if path.exists()))])
