"""Generate the protobuf code in common/proto, or with --check tell whether the committed code is stale.

The generator runs on src/tandem, whose links make the generated imports read `tandem.common.proto`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = Path("tandem/common/proto")
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generate(target: Path) -> None:
    """Write the generated files of every .proto below `target`/tandem/common/proto."""
    sources = [str(path) for path in sorted((ROOT / "src" / PROTO).glob("*.proto"))]
    flags = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'src'}", *flags, *sources]
    subprocess.run(command, check=True, timeout=120)


def generated_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.endswith(SUFFIXES)}


def stale_files() -> list[str]:
    """Names of generated files that differ from what the sources give, are missing, or have no source."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        wanted = generated_files(Path(folder) / PROTO)
    present = generated_files(ROOT / "common" / "proto")
    return sorted(name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name))


def main() -> int:
    if "--check" not in sys.argv[1:]:
        generate(ROOT / "src")
        return 0
    stale = stale_files()
    for name in stale:
        print(f"error: common/proto/{name} is stale; run `make proto` and commit the result")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
