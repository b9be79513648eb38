"""The tokenizers of the tiny models: their true classes, with vocabularies cut to the words of this world.

CLIP's byte alphabet and the order of its merges are CLIP's own (from the table that open_clip carries), Qwen2's byte alphabet too,
so any text still tokenises; words of the world are one token each, all others fall apart into the pieces that are left.
T5's class knows no bytes: letters beyond Latin-1 are its unknown token, as most are in the published vocabulary.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path

from diffusers.modular_pipelines.qwenimage import prompt_templates
from open_clip.tokenizer import bytes_to_unicode, default_bpe, get_pairs
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

from shapes.edits import ANY, FIELDS, TEMPLATES
from shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    NUM_TEMPLATES,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
)

START, END = "<|startoftext|>", "<|endoftext|>"
COMMON_MERGES = 200  # the most frequent merges of English stay, so that foreign text does not fall into single bytes
Merge = tuple[str, str]


def clip_merges() -> list[Merge]:
    """CLIP's 48894 merges in their order."""
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode("utf-8").split("\n")
    pairs = (tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1])
    return [(pair[0], pair[1]) for pair in pairs]


def world_words() -> list[str]:
    """Every word that a caption can hold."""
    pair = (Thing("small", "red", "circle"), Thing("large", "blue", "square"))
    texts = [" ".join((*SHAPES, *COLOURS, *SIZES, *BACKGROUNDS, *POSITIONS))]
    for template in range(NUM_TEMPLATES):
        texts += [caption(Scene(pair[:1], "grey", position=place), template) for place in POSITIONS]
        texts += [caption(Scene(pair, "grey", relation=relation), template) for relation in RELATIONS]
    return sorted({word.strip(",") for text in texts for word in text.split()})


def merges_of(word: str, ranks: dict[Merge, int]) -> set[Merge]:
    """The merges that CLIP applies to one word."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    used: set[Merge] = set()
    while len(pieces) > 1:
        best = min(get_pairs(pieces), key=lambda pair: ranks.get(pair, 10**9))
        if best not in ranks:
            break
        used.add(best)
        joined, i = [], 0
        while i < len(pieces):
            if i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == best:
                joined.append(pieces[i] + pieces[i + 1])
                i += 2
            else:
                joined.append(pieces[i])
                i += 1
        pieces = joined
    return used


def cut_vocabulary() -> tuple[dict[str, int], list[str]]:
    """(vocabulary, merges): all byte tokens, the kept merges in CLIP's order, and last the two special tokens.

    The end token has the highest number, since CLIP pools the text where the number is highest.
    """
    merges = clip_merges()
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    keep = set(merges[:COMMON_MERGES])
    for word in world_words():
        keep |= merges_of(word, ranks)
    kept = [merge for merge in merges if merge in keep]
    alphabet = list(bytes_to_unicode().values())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in kept), START, END]
    unique = list(dict.fromkeys(tokens))
    return {token: number for number, token in enumerate(unique)}, [" ".join(merge) for merge in kept]


def new_tokenizer(max_length: int = 77) -> CLIPTokenizer:
    """A CLIPTokenizer over the cut vocabulary, padded with the end token as CLIP ViT-L is."""
    vocabulary, merges = cut_vocabulary()
    pairs = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=max_length)


def new_t5_tokenizer() -> T5Tokenizer:
    """A T5Tokenizer of the world's words and of single letters; words win over their letters."""
    letters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x100))]
    words = [word for word in world_words() if len(word) > 1]
    pieces = [("\u2581" + word, -1.0) for word in words] + [("\u2581" + letter, -8.0) for letter in letters]
    start = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    return T5Tokenizer(vocab=[*start, *pieces, *((letter, -8.0) for letter in letters)], extra_ids=0)


QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


def edit_words() -> list[str]:
    """Every word that an edit instruction can hold."""
    fields = "|".join(value for name, value in FIELDS.items() if name not in "ab").replace("|", " ")
    texts = [re.sub(r"\{\w+\}", "", template) for templates in TEMPLATES.values() for template in templates]
    return sorted({word.strip(",") for text in (*texts, fields, ANY) for word in text.split()})


def new_qwen_edit_tokenizer() -> Qwen2Tokenizer:
    """That of the tiny Qwen-Image-Edit: the words of edit instructions are one token each, too.

    An instruction's first word follows a picture, with no space between.
    """
    first = [template.split()[0] for templates in TEMPLATES.values() for template in templates]
    return new_qwen_tokenizer((" ".join(("", *edit_words())), "\n".join((*first, "Picture"))))


def new_qwen_tokenizer(more: Sequence[str] = ()) -> Qwen2Tokenizer:
    """A Qwen2Tokenizer in which every word of the world, of the pipelines' templates and of the texts `more` is one token.

    So the heads of the templates, which the pipelines cut off, have the lengths that they have in the published vocabulary.
    """
    own = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(bytes_to_unicode().values())}, merges=[])
    templates = [text for name, text in vars(prompt_templates).items() if name.endswith("PROMPT_TEMPLATE")]
    texts = [" ".join(("", *world_words())), *(text for text in templates for _ in range(2)), *more]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = own._tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=100_000, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    table = json.loads(trained.to_str())["model"]
    made = Qwen2Tokenizer(vocab=table["vocab"], merges=[tuple(pair) for pair in table["merges"]])
    made.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL)})
    return made
