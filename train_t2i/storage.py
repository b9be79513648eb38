"""Raw file operations, each a few lines, that survive a crash or say why they could not.

Every operation calls ``before(name, path)`` first.  It does nothing; tests put a crash or an OSError there, so that
every point of a save can be tried.  A file is durable only after ``sync`` of the file and of the folder holding it.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from train_t2i.errors import EXIT_LOCKED, UserError

CHUNK_BYTES = 8 << 20
VERSION = 1
FILE = re.compile(r"\w+/step-(\d+)/\w+\.(?:safetensors|json)", re.ASCII)
SEAL = b"xxh3_128:"
SEAL_BYTES = len(SEAL) + 32
Manifest = dict[str, list]  # file below checkpoints/ -> [bytes, xxh3_128 as hex]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Damaged(Exception):
    """A file that must not be used; the text names it and says what is wrong with it."""


def before(operation: str, path: Path) -> None:
    """Called ahead of every operation that changes the disk; replaced in tests."""


def make_folder(path: Path) -> None:
    """Make ``path`` and its parents, each durable in the folder above it."""
    if path.is_dir():
        return
    make_folder(path.parent)
    before("mkdir", path)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk."""
    before("write", path)
    path.write_bytes(data)
    sync(path)


def write_atomically(path: Path, data: bytes | str) -> None:
    """The whole new file or the old one, at any instant; the folder is made.  Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make_folder(path.parent)
        write_bytes(temporary, data.encode() if isinstance(data, str) else data)
        rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file and flush it.  Views and tied tensors are written in full.  Raises OSError."""
    before("write", path)
    try:
        safetensors.torch.save_file(_standalone(tensors), path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # it keeps the errno in the text alone
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # save_file leaves 0600, whatever the umask says
    sync(path)


def _standalone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors demands."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() != own.nbytes or storage.data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        result[name] = own
    return result


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    before("sync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (error.errno in (errno.EINVAL, errno.ENOTSUP) and path.is_dir()):  # some mounts cannot sync folders
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Move within one folder, at once and durably."""
    before("rename", target)
    source.rename(target)
    sync(target.parent)


def remove_file(path: Path) -> None:
    before("unlink", path)
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder and what is in it; links are removed, never followed; nothing there is no error."""
    if path.is_symlink() or not path.is_dir():
        return remove_file(path)
    for entry in sorted(path.iterdir()):
        remove_tree(entry)
    before("rmdir", path)
    path.rmdir()


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the disk that holds ``path`` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def digest(path: Path) -> tuple[int, str]:
    """(size in bytes, xxh3_128 as hex) of a file, read in chunks.  Raises OSError."""
    state, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
            size += len(chunk)
    return size, state.hexdigest()


def human(count: int) -> str:
    """Bytes as people read them."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def take_lock(path: Path) -> int:
    """Lock ``path`` for this process, its host and pid inside, and return the descriptor that holds it.

    The kernel drops the lock with its holder, so a crash leaves none.  Raises UserError (EXIT_LOCKED) while another
    process holds it, OSError when the file cannot be made.
    """
    suspect = 0
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            host, pid = _holder(descriptor)
            os.close(descriptor)
            here = host == socket.gethostname()
            if here and pid and not alive(pid):
                if suspect == pid:  # an orphaned child of a dead run holds it: let it keep a file nobody sees
                    path.unlink(missing_ok=True)
                else:  # or a run that has it since a moment and is about to sign
                    time.sleep(0.2)
                suspect = pid
                continue
            unsupported = error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
            if unsupported and not here:  # a file system without locks, and a holder that cannot be asked
                return _sign(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
            raise UserError(
                f"{path.parent} is in use by another run: process {pid or '?'} on {host or 'an unknown host'}",
                "wait for it or stop it, or give this run another --exp-name",
                EXIT_LOCKED,
            ) from None
        if _same_file(_sign(descriptor), path):
            return descriptor
        os.close(descriptor)  # somebody removed it in between: try with the new one


def release_lock(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)


def _sign(descriptor: int) -> int:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
    return descriptor


def _holder(descriptor: int) -> tuple[str, int]:
    """(host, pid) written in the lock file; ("", 0) when there is none."""
    words = os.pread(descriptor, 1000, 0).decode(errors="replace").split()
    return (words[0], int(words[1])) if len(words) == 2 and words[1].isdecimal() else ("", 0)


def alive(pid: int) -> bool:
    """Whether a process of this host is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def seal(step: int, manifest: Manifest, record: Mapping[str, Any]) -> bytes:
    """A record as bytes: the zip archive that torch.save writes, with the digest of all bytes before as its comment."""
    whole = {"version": VERSION, "step": step, "manifest": manifest}
    if taken := set(whole) & set(record):
        raise ValueError(f"these fields of a record are written here: {sorted(taken)}")
    buffer = io.BytesIO()
    torch.save(whole | dict(record), buffer)
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)  # raises on what could be saved but never loaded
    body = buffer.getvalue()
    if body[-22:-18] != b"PK\x05\x06" or body[-2:] != b"\0\0":
        raise RuntimeError("torch.save no longer ends with a plain zip directory")
    body = body[:-2] + SEAL_BYTES.to_bytes(2, "little")
    return body + SEAL + xxhash.xxh3_128_hexdigest(body).encode()


def read_record(path: Path) -> dict[str, Any]:
    """The dict in a record file.  Raises Damaged when it is not whole, UserError when it is not there or not for us."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"no checkpoint at {path}: {error.strerror}", "give a .../torch_units/step-N.pt, or latest"
        ) from None
    body, comment = data[:-SEAL_BYTES], data[-SEAL_BYTES:]
    if comment != SEAL + xxhash.xxh3_128_hexdigest(body).encode():
        raise Damaged(
            f"{path} is damaged, or not a checkpoint of this toolkit: its digest is not the one that was saved"
        )
    try:
        record = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file with a right digest may hold, it is one line to its reader
        raise Damaged(f"{path} cannot be read without running code in it: {str(error).splitlines()[0][:200]}") from None
    if not isinstance(record, dict) or not isinstance(record.get("version"), int):
        raise Damaged(f"{path} is not a checkpoint of this toolkit")
    if record["version"] > VERSION:
        raise UserError(f"{path} was written by a newer version of this toolkit", "update the toolkit")
    if path.stem != f"step-{record.get('step')}" or not _sound(record.get("manifest"), record["step"]):
        raise Damaged(f"{path} does not describe step {path.stem.removeprefix('step-')}")
    return record


def _sound(manifest: object, step: int) -> bool:
    """A manifest names files of its own step only, inside the run's folder."""
    if not isinstance(manifest, dict):
        return False
    for name, entry in manifest.items():
        match = FILE.fullmatch(name) if isinstance(name, str) else None
        if not match or match[1] != str(step) or not isinstance(entry, list) or [*map(type, entry)] != [int, str]:
            return False
    return True
