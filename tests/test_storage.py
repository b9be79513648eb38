"""One file written at once: whatever goes wrong, the old one stays and nothing half-written is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from train_t2i import storage


def test_a_file_is_written_with_its_folder_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "table.json"
    storage.write_atomically(path, "Zürich\n")
    storage.write_atomically(path, b"\0bytes")
    assert path.read_bytes() == b"\0bytes"
    assert [*path.parent.iterdir()] == [path]


def test_what_goes_wrong_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, operations = tmp_path / "table.json", list[str]()
    storage.write_atomically(path, "old")
    monkeypatch.setattr(storage, "before", lambda operation, at: operations.append(operation))
    storage.write_atomically(path, "old")
    assert operations == ["write", "sync", "rename", "sync"]  # durable before it has its name
    for bad in ("write", "sync", "rename"):

        def before(operation: str, at: Path, bad: str = bad) -> None:
            if operation == bad:
                at.touch()
                raise KeyboardInterrupt

        monkeypatch.setattr(storage, "before", before)
        with pytest.raises(KeyboardInterrupt):
            storage.write_atomically(path, "new")
        assert [*tmp_path.iterdir()] == [path]
        assert path.read_text() == "old"
