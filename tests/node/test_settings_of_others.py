"""Environment variables that carry our prefix without being settings."""

from pathlib import Path

import pytest

from shoal.errors import SettingsError
from shoal.node.settings import read_settings


@pytest.mark.parametrize(
    "name", ["SHOAL_URL", "SHOAL_API_KEY", "SHOAL_DEBUG", "SHOAL_TEST_MODELS", "SHOAL_BENCH_LLAMA"]
)
def test_what_other_parts_read_is_no_misspelt_setting(name: str, tmp_path: Path) -> None:
    assert read_settings({"SHOAL_HOME": str(tmp_path), name: "x"}).home == str(tmp_path)


def test_a_misspelt_setting_still_is_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="SHOAL_QUOTA_BYTE is no setting"):
        read_settings({"SHOAL_HOME": str(tmp_path), "SHOAL_QUOTA_BYTE": "1"})
