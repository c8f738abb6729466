"""Rows of a process that may not write: whole or not there, however it ended."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.storage.spool import SpoolReader, SpoolWriter

ROWS = [{"key": number, "id": f"req_{number}", "story": '[1,"ü"]'} for number in range(5)]


def spool(folder: Path) -> Path:
    return folder / "records-1.spool"


def read(reader: SpoolReader) -> list[Any]:
    return [row for rows in reader.read() for row in rows]


def test_what_was_appended_is_read_once(tmp_path: Path) -> None:
    writer, reader = SpoolWriter(spool(tmp_path)), SpoolReader(spool(tmp_path))
    writer.append(ROWS[:2])
    assert read(reader) == ROWS[:2]
    assert read(reader) == []
    writer.append(ROWS[2:])
    assert read(reader) == ROWS[2:]
    assert read(SpoolReader(spool(tmp_path))) == ROWS
    assert spool(tmp_path).stat().st_mode & 0o777 == 0o600
    writer.close()


def test_it_is_over_when_its_writer_has_ended(tmp_path: Path) -> None:
    writer, reader = SpoolWriter(spool(tmp_path)), SpoolReader(spool(tmp_path))
    assert not reader.is_over()
    writer.close()
    assert reader.is_over()
    assert not SpoolReader(tmp_path / "records-2.spool").is_over()


def test_a_cut_at_any_place_costs_no_row_before_it(tmp_path: Path) -> None:
    writer = SpoolWriter(spool(tmp_path))
    writer.append(ROWS[:3])
    writer.close()
    data = spool(tmp_path).read_bytes()
    ends = [place for place, byte in enumerate(data, 1) if byte == 0x0A]
    for size in range(len(data) + 1):
        spool(tmp_path).write_bytes(data[:size])
        assert read(SpoolReader(spool(tmp_path))) == ROWS[: sum(end <= size for end in ends)]


def test_a_line_that_is_damaged_is_left_out(tmp_path: Path) -> None:
    writer = SpoolWriter(spool(tmp_path))
    writer.append(ROWS[:3])
    writer.close()
    first, second, third, rest = spool(tmp_path).read_bytes().split(b"\n")
    for damaged in (second.replace(b"req_1", b"req_9"), b"", b"no spool", b"00000000 [1]", b"zz {}"):
        spool(tmp_path).write_bytes(b"\n".join([first, damaged, third, rest]))
        assert read(SpoolReader(spool(tmp_path))) == [ROWS[0], ROWS[2]]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SpoolWriter(spool(tmp_path))
    writer.append(ROWS[:1])
    written, real = [0], os.write

    def write(descriptor: int, data: Any) -> int:
        written[0] += 1
        if written[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, bytes(data)[:10])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space"):
        writer.append(ROWS[1:3])
    monkeypatch.undo()
    writer.append(ROWS[3:])
    writer.close()
    assert read(SpoolReader(spool(tmp_path))) == [ROWS[0], *ROWS[3:]]


def test_what_was_not_taken_is_read_again(tmp_path: Path) -> None:
    writer, reader = SpoolWriter(spool(tmp_path)), SpoolReader(spool(tmp_path))
    writer.append(ROWS)
    for _ in reader.read():
        # It could not be written.
        break
    assert read(reader) == ROWS
    writer.close()
