"""``python -m tolaria.tamiyo.keys DIR``: the keys that trainer and policy service share, for a service of its own.

    shared.key       both sides          --tamiyo.key_file                  --key-file
    server.secret    the server only                                        --curve-secret-file
    server.public    the trainer         --tamiyo.curve_server_key_file
    client.secret    the trainer only    --tamiyo.curve_secret_file
    client.public    the server                                             --curve-clients-file

A service that only this machine can reach needs shared.key alone.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tolaria.leyline.framing import new_key_file_text
from tolaria.tamiyo.curve import new_key_pair


def write_keys(directory: Path) -> list[Path]:
    """Make ``directory`` (0700) if need be and write fresh keys into it (0600); returns the files.

    Raises FileExistsError, having written nothing over it, when one of the files is there already.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    contents = {"shared.key": new_key_file_text()}
    for side in ("server", "client"):
        public, secret = new_key_pair()
        contents[f"{side}.secret"] = f"{secret}\n"
        contents[f"{side}.public"] = f"{public}\n"
    taken = [str(directory / name) for name in contents if (directory / name).exists()]
    if taken:
        raise FileExistsError(f"{', '.join(taken)}: exists already, nothing was written")
    for name, content in contents.items():
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
    return [directory / name for name in contents]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the keys and name the files; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tolaria.tamiyo.keys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, help="where to write them; made if it does not exist")
    try:
        files = write_keys(parser.parse_args(argv).directory)
    except OSError as error:
        print(f"tolaria.tamiyo.keys: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print("\n".join(str(file) for file in files))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
