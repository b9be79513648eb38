"""Raw file operations, each a few lines, that survive a crash or say why they could not.

Every operation calls ``before(name, path)`` first.  It does nothing; tests put a crash or an OSError there, so that
every point of a save can be tried.  A file is durable only after ``sync`` of the file and of the folder holding it.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import xxhash
from torch import Tensor

from train_t2i.errors import EXIT_LOCKED, UserError

CHUNK_BYTES = 8 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold ``path`` as the lock of one process, its host and pid inside.

    The kernel drops the lock with its holder, so a crash leaves none.  Raises UserError (EXIT_LOCKED) while another
    process holds it.
    """
    descriptor = _take(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _take(path: Path) -> int:
    """An open descriptor of the lock file, locked and signed."""
    suspect = 0
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            host, pid = _holder(descriptor)
            os.close(descriptor)
            here = host == socket.gethostname()
            if here and pid and not _alive(pid):
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


def _sign(descriptor: int) -> int:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
    return descriptor


def _holder(descriptor: int) -> tuple[str, int]:
    """(host, pid) written in the lock file; ("", 0) when there is none."""
    words = os.pread(descriptor, 1000, 0).decode(errors="replace").split()
    return (words[0], int(words[1])) if len(words) == 2 and words[1].isdecimal() else ("", 0)


def _alive(pid: int) -> bool:
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
