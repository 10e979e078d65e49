import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shoal.errors import DigestMismatchError, StorageFullError
from shoal.store.chunk import digest_of
from shoal.store.disk import DiskTier
from shoal.store.home import Store, open_store
from shoal.store.quota import Quota

DATA = bytes(range(256)) * 1000


def files_below(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_a_chunk_lies_uncompressed_under_its_digest(store: Store) -> None:
    digest = digest_of(DATA)

    store.chunks.put(digest, DATA)

    assert (store.home / "chunks" / digest[:2] / digest).read_bytes() == DATA
    assert files_below(store.home) == [digest]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX'")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_who_may_read_a_chunk_is_the_umasks_say(umask: int, mode: int, store: Store) -> None:
    digest = digest_of(DATA)
    before = os.umask(umask)
    try:
        store.chunks.put(digest, DATA)
    finally:
        os.umask(before)

    assert (store.home / "chunks" / digest[:2] / digest).stat().st_mode & 0o777 == mode


def test_a_damaged_chunk_is_reported_and_dropped_so_that_it_can_be_fetched_again(store: Store) -> None:
    digest = digest_of(DATA)
    store.chunks.put(digest, DATA)
    path = store.home / "chunks" / digest[:2] / digest
    damaged = bytearray(DATA)
    damaged[1234] ^= 1
    path.write_bytes(damaged)

    with pytest.raises(DigestMismatchError, match=digest):
        store.chunks.get(digest)

    assert store.chunks.get(digest) is None
    store.chunks.put(digest, DATA)
    assert bytes(store.chunks.get(digest)) == DATA


def test_a_truncated_chunk_is_written_anew(store: Store) -> None:
    digest = digest_of(DATA)
    store.chunks.put(digest, DATA)
    os.truncate(store.home / "chunks" / digest[:2] / digest, 10)

    store.chunks.put(digest, DATA)

    assert bytes(store.chunks.get(digest)) == DATA


def test_bytes_under_a_wrong_digest_are_not_kept(store: Store) -> None:
    with pytest.raises(DigestMismatchError):
        store.chunks.put(digest_of(b"other"), DATA)

    assert files_below(store.home) == []


def test_what_would_pass_the_quota_is_refused_in_numbers_and_leaves_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path, quota_bytes=300_000)
    store.chunks.put(digest_of(DATA), DATA)
    more = b"x" * 50_000

    with pytest.raises(StorageFullError, match="50000 bytes more do not fit: 256000 of the quota's 300000") as caught:
        store.chunks.put(digest_of(more), more)

    assert "shoal gc" in caught.value.hint
    assert files_below(tmp_path) == [digest_of(DATA)]


def test_room_that_another_process_freed_is_seen(tmp_path: Path) -> None:
    store = open_store(tmp_path, quota_bytes=300_000)
    store.chunks.put(digest_of(DATA), DATA)
    open_store(tmp_path).chunks.drop(digest_of(DATA))
    more = b"x" * 50_000

    store.chunks.put(digest_of(more), more)

    assert bytes(store.chunks.get(digest_of(more))) == more


def test_a_chunk_that_is_here_already_needs_no_room(tmp_path: Path) -> None:
    open_store(tmp_path).chunks.put(digest_of(DATA), DATA)

    full = open_store(tmp_path, quota_bytes=1)
    full.chunks.put(digest_of(DATA), DATA)

    assert bytes(full.chunks.get(digest_of(DATA))) == DATA
    with pytest.raises(StorageFullError):
        full.chunks.put(digest_of(b"more"), b"more")


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is not known to Windows")
def test_a_full_disk_is_an_error_of_ours_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    program = """
        import resource, sys
        from pathlib import Path
        from shoal.errors import StorageFullError
        from shoal.store.chunk import digest_of
        from shoal.store.home import open_store
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        data = bytes(256_000)
        try:
            open_store(Path(sys.argv[1])).chunks.put(digest_of(data), data)
        except StorageFullError as error:
            print(error)
    """

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert "cannot write below" in done.stdout
    assert "SHOAL_HOME" in done.stdout
    assert files_below(tmp_path) == []


def test_a_part_becomes_a_chunk_only_if_its_content_is_right(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "chunks", tmp=tmp_path / "tmp", quota=Quota(None))
    part = tmp_path / "part"
    part.write_bytes(DATA)

    with pytest.raises(DigestMismatchError):
        tier.take(digest_of(b"other"), part)
    tier.take(digest_of(DATA), part)

    assert bytes(tier.get(digest_of(DATA))) == DATA
    assert not part.exists()
