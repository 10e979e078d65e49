from pathlib import Path

import pytest

from shoal.errors import SettingsError
from shoal.node.settings import home_folder, read_settings


def written(tmp_path: Path, text: str) -> dict[str, str]:
    (tmp_path / "settings.toml").write_text(text)
    return {"SHOAL_HOME": str(tmp_path)}


def test_without_file_and_environment_there_are_defaults(tmp_path: Path) -> None:
    settings = read_settings({"SHOAL_HOME": str(tmp_path)})

    assert (settings.home, settings.quota_bytes) == (str(tmp_path), None)


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    environment = written(tmp_path, "quota_bytes = 5")

    assert read_settings(environment).quota_bytes == 5
    assert read_settings(environment | {"SHOAL_QUOTA_BYTES": "7"}).quota_bytes == 7


def test_home_is_the_users_data_folder_unless_named() -> None:
    assert home_folder({"XDG_DATA_HOME": "/data"}) == Path("/data/shoal")
    assert home_folder({"XDG_DATA_HOME": "relative"}) == Path.home() / ".local/share/shoal"
    assert home_folder({"XDG_DATA_HOME": "/data", "SHOAL_HOME": "~/s"}) == Path.home() / "s"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("quota_byte = 5", "quota_byte is no setting", "did you mean quota_bytes"),
        ("home = '/x'", "home is no setting", "quota_bytes"),
        ("quota_bytes = '5'", "quota_bytes", "allowed settings: "),
        ("quota_bytes = -1", "quota_bytes", "allowed settings: "),
        ("fetch_bytes_per_s = 0", "fetch_bytes_per_s", "allowed settings: "),
        ("quota_bytes = [", "cannot be read", "mend it"),
    ],
)
def test_a_wrong_file_is_named_with_what_would_be_right(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        read_settings(written(tmp_path, text))

    assert hint in caught.value.hint


def test_a_misspelt_variable_is_an_error_and_others_programs_are_not(tmp_path: Path) -> None:
    home = {"SHOAL_HOME": str(tmp_path), "PATH": "/bin", "SHOAL_DEBUG": "1", "SHOAL_TEST_MODELS": "/m"}
    read_settings(home)

    with pytest.raises(SettingsError, match="SHOAL_QOTA_BYTES is no setting") as caught:
        read_settings(home | {"SHOAL_QOTA_BYTES": "5"})

    assert "did you mean SHOAL_QUOTA_BYTES" in caught.value.hint


def test_a_variable_of_the_wrong_type_names_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="quota_bytes"):
        read_settings({"SHOAL_HOME": str(tmp_path), "SHOAL_QUOTA_BYTES": "many"})
