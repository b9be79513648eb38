"""``python -m train_t2i cache``: encode every prompt once; training then takes ``--prompt-cache DIR`` and no text encoder.

Under a launcher of several processes each encodes its share of the shards; they need no word with one another, since a
shard's prompts, and the batches they are encoded in, follow from the data and the settings alone: the files are the same for
any number of processes.  A stopped run goes on with the same command: finished shards stay.  The files are described in
prompt_cache.py and docs/prompt_cache.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_t2i.cli import parse_verb
from train_t2i.config import EDIT_FAMILIES, Config, fields_of, flag
from train_t2i.errors import EXIT_DISK, EXIT_DONE, EXIT_PREEMPTED, UserError
from train_t2i.shares import Share, cannot_be_written, locked

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from train_t2i.families import Cond, Family
    from train_t2i.mapped import ShardWriter
    from train_t2i.packing import Layout
    from train_t2i.prompt_index import Index
    from train_t2i.prompts import PromptStore

STORE_HELP = "stored numbers: native (the encoder's own, exact), bf16, or fp8 (half of bf16, with a scale a token)"


@dataclass(frozen=True)
class CacheConfig:
    """Encode prompts and keep their embeddings."""

    family: str = flag("auto", "architecture; auto reads model_index.json", choices=fields_of("dmdr")["model_family"].metadata["choices"])  # fmt: skip
    pretrained_model: str = flag(Config.pretrained_model, "model whose text encoders are used")
    data_path_train: str = flag(Config.data_path_train, "prompts, as for train; tables of images and of pairs too")
    out: str | None = flag(None, "folder to write (default: data/t2i_prompts_3m/preproc_FAMILY)")
    max_size: int = flag(0, "only the last so many prompts of the data; 0: all", low=0)
    text_length: int = flag(0, "tokens of a prompt; 0: the family's own", low=0)
    store: str = flag("native", STORE_HELP, choices=("native", "bf16", "fp8"))
    batch_size: int = flag(32, "prompts a batch", low=1)
    shard_size: int = flag(1024, "prompts a file", low=1)
    mixed_precision: str = flag(
        "fp16", "number format of the text encoders, as train's", choices=("no", "fp16", "bf16")
    )


@dataclass
class Job:
    """What this process works on."""

    config: CacheConfig
    folder: Path
    share: Share
    prompts: PromptStore
    rows: range  # of them, in the cache
    index: Index
    family: Family
    record: dict[str, Any]  # cache.json

    def metadata(self, name: str, layout: Layout) -> dict[str, str]:
        """Of a file: which one it is, of which cache, and what its embeddings are."""
        from train_t2i.prompt_cache import cache_digest

        told = json.dumps(dataclasses.asdict(layout))
        return {"name": name, "cache": cache_digest(self.record), "layout": told}


# ==== before the first prompt =======================================================================================


def default_out(family: str) -> Path:
    return Path("data/t2i_prompts_3m") / f"preproc_{family.removesuffix('_image')}"


def prepare(config: CacheConfig, folder: Path, run: Config, share: Share) -> Job:
    """Read the prompts and load the encoders; make the folder's record, or check that it is of the same."""
    import torch

    from train_t2i import build, prompt_index
    from train_t2i.engine import DTYPES
    from train_t2i.prompt_cache import KEY, PROMPTS, VERSION
    from train_t2i.prompts import load_prompts

    prompts = load_prompts(config.data_path_train)
    rows = range(max(0, len(prompts) - config.max_size) if config.max_size else 0, len(prompts))
    try:
        index = prompt_index.build(prompts, rows)
    except OSError as error:
        raise UserError(
            f"the index of {len(rows)} prompts cannot be written to {tempfile.gettempdir()} ({error.strerror})",
            "make room there, or set TMPDIR to a folder that has some",
            EXIT_DISK,
        ) from None
    dtype = DTYPES[config.mixed_precision]
    family = build.build_family(run, dtype)
    record = {
        "version": VERSION,
        KEY: build.cache_key(family, run, dtype),
        PROMPTS: {"count": len(rows), "unique": index.unique, "digest": index.digest, "max_size": config.max_size},
        "store": config.store,
        "batch_size": config.batch_size,
        "shard_size": config.shard_size,
    }
    job = Job(config, folder, share, prompts, rows, index, family, record)
    check_folder(job)
    if torch.cuda.is_available():
        family.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    return job


def check_folder(job: Job) -> None:
    """Raise a UserError where the folder was begun with anything else; the main process begins it where nobody has."""
    from train_t2i.mapped import replacing
    from train_t2i.prompt_cache import INDEX, KEY, PROMPTS, RECORD, read_record

    if (job.folder / RECORD).exists():
        then = read_record(job.folder)
        before, now = ({**told, **told[KEY], **told[PROMPTS]} for told in (then, job.record))
        names = [name for name in now if name not in (KEY, PROMPTS) and before.get(name) != now[name]]
        if names:
            told = "; ".join(f"{name}: then {before.get(name)!r}, now {now[name]!r}" for name in names)
            raise UserError(
                f"--out {job.folder}: begun with other settings or prompts ({told})", "choose another --out"
            )
    elif job.share.is_main:
        with replacing(job.folder / RECORD) as file:
            file.write((json.dumps(job.record, indent=1, ensure_ascii=False) + "\n").encode())
    if job.share.is_main and not (job.folder / INDEX).exists():
        job.index.write(job.folder / INDEX)


# ==== encoding ======================================================================================================


def embeddings(cond: Cond) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """(tokens that are attended to, pooled) of each row, on the CPU."""
    tokens = cond.tokens.cpu()
    pooled = [None] * len(tokens) if cond.pooled is None else [*cond.pooled.cpu()]
    if cond.mask is None:
        return list(zip(tokens, pooled, strict=True))
    mask = cond.mask.bool().cpu()
    return [(row[kept], part) for row, kept, part in zip(tokens, mask, pooled, strict=True)]


def layout_for(job: Job, cond: Cond) -> Layout:
    from train_t2i.packing import Layout

    dtype = str(cond.tokens.dtype).removeprefix("torch.")
    return Layout(job.config.store, dtype, cond.tokens.shape[-1], 0 if cond.pooled is None else cond.pooled.shape[-1])


def write_rows(writer: ShardWriter, first: int, layout: Layout, texts: Sequence[str], cond: Cond) -> int:
    """Add a batch's embeddings; their bytes.  Raises UserError for one that is not finite: it would poison training."""
    from train_t2i.prompt_cache import write_entry

    written = 0
    for i, (text, (tokens, pooled)) in enumerate(zip(texts, embeddings(cond), strict=True)):
        parts = [tokens] if pooled is None else [tokens, pooled]
        if not all(bool(part.isfinite().all()) for part in parts):
            raise UserError(
                f"the text encoders give a number that is not finite for {text[:200]!r}",
                "use another --mixed-precision (bf16 has the range of fp32)",
            )
        written += write_entry(writer, first + i, layout, text, (tokens, pooled))
    return written


def write_empty(job: Job) -> None:
    """The empty prompt, and what guidance moves away from where no text is given."""
    from train_t2i.mapped import ShardWriter, replacing
    from train_t2i.prompt_cache import EMPTY, TABLES

    cond = job.family.encode([""], "")
    assert cond.negative is not None
    layout = layout_for(job, cond)
    with replacing(job.folder / EMPTY) as file:
        writer = ShardWriter(file, 2, TABLES, job.metadata(EMPTY, layout))
        for row, part in enumerate((cond, cond.negative)):
            write_rows(writer, row, layout, [""], part)
        writer.finish()


def write_shard(job: Job, shard: int, rows: Sequence[int], progress: Progress) -> None:
    """One file of embeddings, complete or absent."""
    from train_t2i.mapped import ShardWriter, replacing
    from train_t2i.prompt_cache import TABLES, shard_name

    size, name, writer = job.config.batch_size, shard_name(shard), None
    with replacing(job.folder / name) as file:
        for first in range(0, len(rows), size):
            texts = [job.prompts[job.rows[row]] for row in rows[first : first + size]]
            cond = job.family.encode(texts, None)
            layout = layout_for(job, cond)
            writer = writer or ShardWriter(file, len(rows), TABLES, job.metadata(name, layout))
            progress.add(len(texts), write_rows(writer, first, layout, texts, cond))
        assert writer is not None
        writer.finish()


class Progress:
    """A bar with the time that is left and the size that all of it will have; only the main process shows its own."""

    def __init__(self, job: Job, left: int) -> None:
        from tqdm import tqdm

        self.left = left
        self.bar: tqdm = tqdm(total=left, unit="prompt", desc="cache", disable=not job.share.is_main)
        self.job, self.entries, self.bytes, self.warned = job, 0, 0, False

    def add(self, entries: int, written: int) -> None:
        from train_t2i.storage import free_bytes, human

        self.entries, self.bytes = self.entries + entries, self.bytes + written
        whole = self.bytes * self.job.index.unique // self.entries
        self.bar.set_postfix_str(f"about {human(whole)} in all", refresh=False)
        self.bar.update(entries)
        left = self.bytes * self.left // self.entries - self.bytes  # of this process
        if not self.warned and left > (free := free_bytes(self.job.folder)):
            self.warned = True
            self.bar.write(
                f"warning: about {human(left)} are still to come, {human(free)} are free (--max-size, --store fp8)"
            )


def encode_all(job: Job) -> None:
    """This process's shards, in their order."""
    from train_t2i.prompt_cache import EMPTY, shard_name

    def is_mine(shard: int) -> bool:
        return job.share.takes(shard) and not (job.folder / shard_name(shard)).exists()

    size, unique = job.config.shard_size, job.index.unique
    mine = {shard for shard in range(-(-unique // size)) if is_mine(shard)}
    if job.share.is_main and not (job.folder / EMPTY).exists():
        write_empty(job)
    progress = Progress(job, sum(min(size, unique - shard * size) for shard in mine))
    with contextlib.closing(progress.bar):
        for shard, rows in enumerate(job.index.first_rows(size) if mine else ()):
            if shard in mine:
                write_shard(job, shard, rows.tolist(), progress)


def summary(job: Job) -> str:
    """What the folder holds, once it is complete; until then nothing, since other processes are still at it."""
    from train_t2i.prompt_cache import missing_files
    from train_t2i.storage import human

    if missing_files(job.folder, job.record):
        return ""
    count, unique = len(job.rows), job.index.unique
    size = sum(path.stat().st_size for path in job.folder.glob("*.safetensors"))
    return f"{job.folder}: {count} prompts, {unique} different, {human(size)} ({size // count} bytes a prompt)"


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(CacheConfig, "cache", arguments)
    from train_t2i.build import check_family_flags
    from train_t2i.families import family_of

    family = family_of(config.pretrained_model) if config.family == "auto" else config.family
    run = Config(
        model_family=family, pretrained_model=config.pretrained_model, text_length=config.text_length,
        mixed_precision=config.mixed_precision,
    )  # fmt: skip
    check_family_flags(run, family)
    if family in EDIT_FAMILIES:
        raise UserError(f"{family} reads its texts beside their sources: there is nothing to cache", "train without")
    folder, share = Path(config.out) if config.out else default_out(family), Share.of_environment()
    try:
        with locked(folder, share):
            job = prepare(config, folder, run, share)
            encode_all(job)
            print(summary(job) or f"{folder}: process {share.rank} of {share.world} is done")
    except OSError as error:
        raise cannot_be_written(folder, error) from None
    except KeyboardInterrupt:
        raise UserError("stopped", "the same command goes on with it", EXIT_PREEMPTED) from None
    return EXIT_DONE
