"""Uploads through the real client of the hub, to a server on this machine that keeps what it is sent."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from train_t2i.errors import UserError
from train_t2i.push import check_push, files_of, listing, upload

TOKEN = "hf_thisIsNoTokenOfAnybody"  # noqa: S105


class Hub:
    """The few addresses of the hub's API that one upload calls; ``repos``: ORG/NAME -> whether it is private."""

    def __init__(self):
        self.repos, self.files, self.calls, self.fails = {}, {}, [], None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def handler(hub):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                repo = self.path.removeprefix("/api/models/").partition("?")[0]
                known = repo in hub.repos
                self.answer(200 if known else 404, {"id": repo, "private": hub.repos.get(repo)})

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.calls.append((self.path, self.headers["Authorization"]))
                if hub.fails and hub.fails[0] in self.path:
                    self.answer(hub.fails[1], {"error": hub.fails[2]})
                elif self.path == "/api/repos/create":
                    asked = json.loads(body)
                    repo = f"{asked['organization']}/{asked['name']}"
                    status = 409 if repo in hub.repos else 200
                    hub.repos.setdefault(repo, asked.get("private", asked.get("visibility") == "private"))
                    self.answer(status, {"url": f"{hub.address}/{repo}"})
                elif "/preupload/" in self.path:
                    named = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                             for file in json.loads(body)["files"]]  # fmt: skip
                    self.answer(200, {"files": named})
                elif "/commit/" in self.path:
                    lines = [json.loads(line) for line in body.splitlines()]
                    hub.files |= {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                                  for line in lines if line["key"] == "file"}  # fmt: skip
                    self.answer(200, {"commitUrl": f"{hub.address}/o/n/commit/abc", "commitOid": "abc"})
                else:
                    self.answer(200, {})

            def answer(self, status, value):
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *told): ...

        return Handler


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", made.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "pipeline"
    (made / "unet").mkdir(parents=True)
    (made / "README.md").write_text("---\nlicense: mit\n---\n# a\n")
    (made / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 10)
    (made / "unet" / "empty.json").write_bytes(b"")
    return made


def test_every_file_arrives_in_a_private_repository(hub, folder):
    check_push("org/name", public=False, dry_run=False)
    assert "/commit/abc" in upload(folder, "org/name", public=False, dry_run=False)
    assert hub.repos == {"org/name": True}
    assert hub.files == {str(path): (folder / path).read_bytes() for path in files_of(folder)}
    assert len(hub.files) == 3
    assert {sent for _, sent in hub.calls} == {f"Bearer {TOKEN}"}


def test_public_is_asked_for(hub, folder):
    upload(folder, "org/name", public=True, dry_run=False)
    assert hub.repos == {"org/name": False}
    assert len(hub.files) == 3


def test_nothing_goes_into_a_public_repository_unasked(hub, folder):
    hub.repos["org/name"] = False
    with pytest.raises(UserError, match="is public"):
        upload(folder, "org/name", public=False, dry_run=False)
    assert not hub.files
    hub.repos["org/name"] = True
    upload(folder, "org/name", public=False, dry_run=False)
    assert len(hub.files) == 3


def test_a_dry_run_lists_and_asks_nobody(hub, folder):
    check_push("org/name", public=False, dry_run=True)
    said = upload(folder, "org/name", public=False, dry_run=True)
    assert not hub.calls
    assert [line.split()[-1] for line in said.splitlines()[:3]] == [
        "README.md",
        "unet/empty.json",
        "unet/weights.safetensors",
    ]
    assert "0.003 MB  3 files, not uploaded" in said
    assert said.endswith("https://huggingface.co/org/name (private)")
    assert listing(folder, "org/name", public=True).endswith("(public)")


@pytest.mark.parametrize("place", ["create", "preupload", "commit"])
def test_a_failed_upload_is_one_line_without_the_token(hub, folder, place):
    hub.fails = (place, 403, f"no right to write, {TOKEN}")
    with pytest.raises(UserError) as failed:
        upload(folder, "org/name", public=False, dry_run=False)
    said = str(failed.value)
    assert "not uploaded" in said
    assert f"hf upload --private org/name {folder}" in said
    assert TOKEN not in said
    assert folder.is_dir()


def test_mistakes_are_told_before_the_export(hub, monkeypatch):
    def refused(repo, said, **given):
        with pytest.raises(UserError, match=said):
            check_push(repo, **{"public": False, "dry_run": False, **given})

    refused("name", "not a repository")
    refused("a/b/c", "--push a/b/c")
    refused("org/na me", "--push org/na me")
    refused(None, "--push-public without --push", public=True)
    refused(None, "--dry-run without --push", dry_run=True)
    check_push(None, public=False, dry_run=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refused("org/name", "nobody is logged in")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("org/name", "HF_HUB_OFFLINE is set")
    check_push("org/name", public=False, dry_run=True)
