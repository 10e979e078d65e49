"""Logs."""

import io
import json

import pytest

from shoal.errors import SettingsError
from shoal.observe.log import LogStyle, set_up_logs


def test_a_json_line_carries_the_event_its_level_time_and_fields() -> None:
    stream = io.StringIO()

    set_up_logs(stream, LogStyle.JSON).warning("node lost", node="a", silent_s=1.5)

    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["node"], line["silent_s"]) == ("node lost", "warning", "a", 1.5)
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize("style", LogStyle)
def test_what_users_wrote_never_reaches_a_log(style: LogStyle) -> None:
    stream = io.StringIO()
    log = set_up_logs(stream, style)

    log.info("request", prompt="the secret", messages=[{"content": "the secret"}], prompt_tokens=2)

    assert "the secret" not in stream.getvalue()
    assert "prompt_tokens" in stream.getvalue()


def test_lines_below_the_level_are_not_written() -> None:
    stream = io.StringIO()
    log = set_up_logs(stream, LogStyle.JSON, "error")

    log.info("quiet")
    log.error("loud")

    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_an_exception_is_logged_with_its_traceback() -> None:
    stream = io.StringIO()
    log = set_up_logs(stream, LogStyle.JSON)
    try:
        int("broken")
    except ValueError:
        log.exception("step failed")

    assert "ValueError: invalid literal" in json.loads(stream.getvalue())["exception"]


def test_an_unknown_level_is_refused_with_the_ones_that_exist() -> None:
    with pytest.raises(SettingsError, match="debug, info, warning or error"):
        set_up_logs(io.StringIO(), level="loud")
