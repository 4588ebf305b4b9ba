"""A byte-pair tokenizer of a small vocabulary, in the two files of CLIP's: vocab.json and merges.txt."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def build(words: Sequence[str], length: int) -> Any:
    """A transformers.CLIPTokenizer that pads and cuts to `length` tokens and has one token for each of the words."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write(words, Path(folder))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def write(words: Sequence[str], folder: Path) -> None:
    """vocab.json and merges.txt, which every version of CLIPTokenizer reads."""
    merges = byte_pairs(words)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def byte_pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """The merges, in order: the most frequent pair of neighbours becomes one symbol until each word is one (Sennrich et
    al. 2016). Each word counts once; of equally frequent pairs the first in the alphabet is taken.

    A list of merges made word by word would not do: "r e" for red would come before what green needs.
    """
    split = [[*word[:-1], word[-1] + WORD_END] for word in dict.fromkeys(words)]
    merges = []
    while True:
        pairs = Counter(pair for symbols in split for pair in itertools.pairwise(symbols))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_merged(symbols, best) for symbols in split]


def vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Token -> id: 256 bytes, the same at the end of a word, what merges make, begin and end: what is no known word
    falls to bytes."""
    symbols = byte_symbols()
    tokens = [*symbols, *(s + WORD_END for s in symbols), *("".join(pair) for pair in merges), BEGIN, END]
    return {token: number for number, token in enumerate(tokens)}


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (Radford et al. 2019): itself where
    it is one, else the next one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged
