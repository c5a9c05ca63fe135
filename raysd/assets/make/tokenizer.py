"""The tokenizer of the bundled models: a real CLIP byte-pair encoding with a few hundred tokens.

Most of the renderer's words are one token (where merges of two words compete, a few); any other text falls apart into
parts of words and bytes, so that nothing is unknown.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from raysd.assets.make.renderer import COLOURS, PATTERNS, POSITIONS, SHAPES, SIZES

LENGTH = 24
GRAMMAR = ("a", "an", "on", "at", "of", "the", "background", "picture", ",")
END = "</w>"


def words() -> list[str]:
    return sorted({*COLOURS, *SHAPES, *SIZES, *POSITIONS, *PATTERNS, *GRAMMAR})


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """({token: id}, merges): all bytes, the merges that build each word from the left, and the two special tokens."""
    tokens = [symbol + end for end in ("", END) for symbol in byte_symbols()]
    merges: list[tuple[str, str]] = []
    for word in words():
        parts = [*word[:-1], word[-1] + END]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens.append(parts[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: place for place, token in enumerate(dict.fromkeys(tokens))}, list(dict.fromkeys(merges))


def build_tokenizer() -> Any:
    """A `CLIPTokenizer` that pads and cuts to `LENGTH` tokens."""
    from transformers import CLIPTokenizer

    ids, merges = vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        vocab, rules = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps(ids), encoding="utf-8")
        rules.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
        return CLIPTokenizer(vocab=str(vocab), merges=str(rules), model_max_length=LENGTH)
