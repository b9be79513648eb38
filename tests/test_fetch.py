"""fetch: downloads, digests, names, mistakes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tiny_runs import refused

from train_t2i.__main__ import main

WEIGHTS = b"weights of a tower"


@pytest.fixture
def manifest(tmp_path):
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    text = f"""
[real."tower-1.0"]
what = "a tower"
repository = "someone/towers"
repository_type = "model"
file = "deep/tower.bin"
revision = "abc"
local_name = "Tower.bin"
licence = "MIT"
sha256 = "{digest}"
[real.prompts]
repository = "someone/prompts"
repository_type = "dataset"
file = "prompts.txt"
[real.pipeline]
repository = "someone/pipeline"
local_name = "pipeline"
[real.rogue]
repository = "someone/rogue"
local_name = "../rogue"
file = "x"
[tiny.world]
what = "made here"
command = "python -m shapes.pretrain"
"""
    path = tmp_path / "manifest.toml"
    path.write_text(text)
    return path


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps to itself what it was asked; ``content`` is what it sends, or raises."""
    import huggingface_hub

    class Hub:
        content = WEIGHTS
        asked: list[dict] = []  # noqa: RUF012

    def download(**asked):
        Hub.asked.append(asked)
        if isinstance(Hub.content, Exception):
            raise Hub.content
        path = Path(asked["local_dir"]) / asked.get("filename", "unet/model.bin")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Hub.content)
        return str(path) if "filename" in asked else asked["local_dir"]

    Hub.asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return Hub


def test_fetch_downloads_checks_and_renames(manifest, hub, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["fetch", "tower-1.0", "prompts", "--out", str(out), "--manifest", str(manifest)]
    assert main(arguments) == 0
    assert (out / "Tower.bin").read_bytes() == WEIGHTS
    assert (out / "prompts.txt").is_file()
    said = capsys.readouterr().out
    assert "its sha256 is right" in said
    assert "no digest is known" in said
    asked = hub.asked[0]
    assert (asked["repo_id"], asked["filename"], asked["revision"]) == ("someone/towers", "deep/tower.bin", "abc")
    assert [a["repo_type"] for a in hub.asked] == ["model", "dataset"]
    assert sorted(path.name for path in out.iterdir() if path.name != ".fetch") == ["Tower.bin", "prompts.txt"]
    assert main(arguments) == 0  # nothing to do the second time
    assert len(hub.asked) == 2
    assert "already there, its sha256 is right" in capsys.readouterr().out


def test_fetch_of_a_folder(manifest, hub, tmp_path):
    assert main(["fetch", "--name", "pipeline", "--out", str(tmp_path / "o"), "--manifest", str(manifest)]) == 0
    assert (tmp_path / "o" / "pipeline" / "unet" / "model.bin").is_file()
    assert "*.bin" in hub.asked[0]["ignore_patterns"]


def test_a_wrong_digest_is_not_used(manifest, hub, tmp_path, capsys):
    hub.content = b"something else"
    common = ["fetch", "tower-1.0", "--out", tmp_path / "out", "--manifest", manifest]
    assert "sha256" in refused(capsys, *common)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    (tmp_path / "out" / "Tower.bin").write_bytes(b"damaged since")
    assert "remove it" in refused(capsys, *common)


def test_fetch_without_names_lists(manifest, capsys):
    assert main(["fetch", "--manifest", str(manifest)]) == 0
    said = capsys.readouterr().out
    assert "tower-1.0" in said
    assert "someone/towers; MIT" in said
    assert "made here" in said


def test_mistakes_of_fetch(manifest, hub, tmp_path, capsys):
    import httpx
    from huggingface_hub.errors import LocalEntryNotFoundError

    common = ["--manifest", manifest, "--out", tmp_path / "out"]
    assert "it has: tower-1.0" in refused(capsys, "fetch", "none", *common)
    assert "shapes.pretrain" in refused(capsys, "fetch", "world", *common)
    assert "leaves the folder" in refused(capsys, "fetch", "rogue", *common)
    assert "no such file" in refused(capsys, "fetch", "--manifest", tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[real")
    assert "cannot be read" in refused(capsys, "fetch", "--manifest", tmp_path / "bad.toml")
    for error in (
        LocalEntryNotFoundError("offline\nhere"),
        httpx.ConnectError("no route"),
        OSError(101, "unreachable"),
    ):
        hub.content = error
        assert "cannot be downloaded from someone/towers" in refused(capsys, "fetch", "tower-1.0", *common)
    hub.content = OSError(28, "No space left on device")
    assert "make room" in refused(capsys, "fetch", "tower-1.0", *common, code=5)
    (tmp_path / "file").write_text("")
    assert "--out" in refused(capsys, "fetch", "tower-1.0", "--manifest", manifest, "--out", tmp_path / "file")


def test_the_projects_own_manifest_is_read_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fetch"]) == 0
    said = capsys.readouterr().out
    assert "HPS_v2.1" in said or "hpsv2" in said
