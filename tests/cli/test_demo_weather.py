"""Changes to a demo that runs, by hand."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from shoal.cli.demo_weather import change, clear
from shoal.errors import SettingsError
from shoal.ids import NodeId
from shoal.node.running import Running, lock_file, running_file
from shoal.node.weather import Weather, read_weather
from shoal.node.worker_spec import LinkShape
from shoal.store.lock import try_locked

NAMES = ("gateway", "box", "board")


def running(home: Path, name: str) -> None:
    running_file(home).parent.mkdir(parents=True)
    said = Running(node=NodeId(name[0] * 32), name=name, url="", locators=())
    running_file(home).write_bytes(msgspec.json.encode(said))


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Of three nodes that run."""
    found = {name: tmp_path / name for name in NAMES}
    with ExitStack() as stack:
        for name, home in found.items():
            running(home, "abc"[NAMES.index(name)])
            assert stack.enter_context(try_locked(lock_file(home)))
        yield found


def test_a_device_that_is_slowed_down_and_a_link_are_told_to_their_ends(
    homes: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change(homes, ["box=6"], ["gateway:box=40ms,8mbit"], restore=False)

    far = {"latency_s": 0.04, "bytes_per_s": 1e6}
    assert read_weather(homes["box"]) == Weather(slowdown=6, links=(LinkShape(target=NodeId("a" * 32), **far),))
    assert read_weather(homes["gateway"]) == Weather(links=(LinkShape(target=NodeId("b" * 32), **far),))
    assert read_weather(homes["board"]) == Weather()
    assert capsys.readouterr().out.splitlines() == [
        "box is now 6 times slower than this machine",
        "the link between gateway and box is now 40ms,8mbit",
    ]


def test_what_is_not_named_stays_until_all_is_restored(homes: dict[str, Path]) -> None:
    change(homes, ["box=6"], ["gateway:box=40ms,8mbit"], restore=False)
    change(homes, [], ["gateway:box=20ms,8mbit"], restore=False)
    assert read_weather(homes["box"]).slowdown == 6
    assert [link.latency_s for link in read_weather(homes["box"]).links] == [0.02]

    change(homes, ["board=9"], [], restore=True)

    assert read_weather(homes["box"]) == Weather()
    assert read_weather(homes["board"]) == Weather(slowdown=9)


@pytest.mark.parametrize(
    ("slow", "links"),
    [(["box"], []), (["tower=2"], []), (["box=fast"], []), ([], ["box=1ms,1mbit"]), ([], ["box:box=1ms,1mbit"]),
     ([], ["box:board=soon"])],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_an_example(
    homes: dict[str, Path], slow: list[str], links: list[str]
) -> None:
    with pytest.raises(SettingsError) as refused:
        change(homes, slow, links, restore=False)

    assert "write " in refused.value.hint
    assert all(read_weather(home) == Weather() for home in homes.values())


def test_without_a_demo_there_is_nothing_to_change(tmp_path: Path) -> None:
    homes = {name: tmp_path / name for name in NAMES}
    with pytest.raises(SettingsError, match="no demo runs"):
        change(homes, ["box=6"], [], restore=False)

    clear(homes)
    assert not tmp_path.joinpath("box").exists()
