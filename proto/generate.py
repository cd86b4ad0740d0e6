"""Generate the Python code of the schemas in this folder.

    python proto/generate.py [OUTPUT_FOLDER]

Writes one flat package (default: tolaria/leyline/generated). The result depends only on the schemas and on the
version of grpcio-tools, so that a test can compare it with what is committed.
"""

import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

SCHEMA_ROOT = Path(__file__).resolve().parent
SCHEMAS = ("esper/leyline/v1/leyline.proto", "tolaria/v1/tolaria.proto")
OUTPUT = SCHEMA_ROOT.parent / "tolaria" / "leyline" / "generated"
PACKAGE = "tolaria.leyline.generated"
INIT = '"""Generated from proto/ by proto/generate.py; not edited by hand."""\n'

# protoc imports a schema by its path below the schema root; the flat package has no such folders.
_SCHEMA_IMPORT = re.compile(r"^from (?:esper\.leyline|tolaria)\.v1 import ", re.MULTILINE)


def generate(output: Path) -> list[Path]:
    """Write the generated package into ``output`` and return its files. Raises RuntimeError if protoc fails."""
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "__init__.py"]
    written[0].write_text(INIT, encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        _run_protoc(Path(scratch))
        for produced in sorted(Path(scratch).rglob("*_pb2.py*")):
            code = _SCHEMA_IMPORT.sub(f"from {PACKAGE} import ", produced.read_text(encoding="utf-8"))
            target = output / produced.name
            target.write_text(code, encoding="utf-8")
            written.append(target)
    return written


def _run_protoc(output: Path) -> None:
    well_known = files("grpc_tools") / "_proto"
    arguments = ["protoc", f"-I{SCHEMA_ROOT}", f"-I{well_known}", f"--python_out={output}", f"--pyi_out={output}"]
    code = protoc.main([*arguments, *SCHEMAS])
    if code != 0:
        raise RuntimeError(f"protoc ended with {code}; its messages are above")


if __name__ == "__main__":
    for path in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT):
        print(path)
