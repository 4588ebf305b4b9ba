"""A folder of pictures as a model: whatever made them, they are scored as they lie there."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench import images
from bench.text import brief
from bench.types import Error, UsageError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class FolderOfImages:
    """The pictures below a folder, named by their relative paths; hidden names and other files are passed over.

    `prompts` is a CSV file with the columns name, prompt and perhaps seed, which makes the folder a text-to-image
    model for these prompts: of several pictures of one prompt, the seed says which; a single one stands for
    one seed, whichever is asked for. The identity is that of the files: another picture, or another name, is another
    model.

    Raises UsageError where there is no such folder, and Error where it holds no picture or a link, or the CSV names
    what is not there.
    """

    def __init__(self, path: Path, prompts: Path | None = None, *, device: str = "cpu"):
        self.folder = Path(os.path.expanduser(path))
        if not self.folder.is_dir():
            raise UsageError(f"path = {path} is not a folder", hint="-m path=FOLDER names a folder of pictures")
        self._names = images.files(self.folder)
        if not self._names:
            raise Error(f"{path} holds no pictures", hint=f"looked for {', '.join(images.SUFFIXES)}")
        self._known = frozenset(self._names)
        links = [name for name in self._names if (self.folder / name).is_symlink()]
        if links:
            more = f" and {len(links) - 1:,} more" if len(links) > 1 else ""
            raise Error(f"{self.folder / links[0]}{more} is a link", hint="copy the file in place of the link")
        self.device = device
        if prompts is None:
            self.generate = None  # no capability without prompts
        else:
            self._by_prompt = _read_prompts(Path(os.path.expanduser(prompts)), self._known)
            self._asked: dict[str, int] = {}  # name of a prompt's only picture -> seed that it was given for

    def names(self) -> Sequence[str]:
        return self._names

    def pictures(self, names: Sequence[str]) -> list[np.ndarray]:
        """uint8 [H, W, 3] each, read by the rules of bench.images; Error names the file that cannot be read."""
        return [images.read(self._file(name)) for name in names]

    def formats(self, names: Sequence[str]) -> list[str]:
        return [images.format_of(self._file(name)) for name in names]

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1]: the picture of each prompt; a seed chooses where a prompt has several.

        Raises Error for a prompt that the CSV lacks, for a seed that none of several pictures has, for a second seed
        where there is one picture, and where the pictures of a batch differ in size.
        """
        import numpy as np
        import torch

        names = [self._look_up(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        found = self.pictures(names)
        for name, picture in zip(names, found, strict=True):
            if picture.shape != found[0].shape:
                sizes = " and ".join(f"{p.shape[1]}x{p.shape[0]} px" for p in (found[0], picture))
                raise Error(
                    f"{names[0]} and {name} differ in size: {sizes}", hint="bring the folder to one size, or --batch 1"
                )
        return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous().float().div_(255).to(self.device)

    def _file(self, name: str) -> Path:
        if name not in self._known:
            raise Error(f"{self.folder} has no picture {name!r}", hint="names are relative paths below the folder")
        return self.folder / name

    def _look_up(self, prompt: str, seed: int) -> str:
        pictures = self._by_prompt.get(prompt)
        if pictures is None:
            raise Error(f"the folder has no picture of the prompt {prompt!r}", hint="add it to the CSV of prompts")
        if len(pictures) == 1:
            (name,) = pictures.values()
            if self._asked.setdefault(name, seed) != seed:  # copies would count as draws of their own
                raise Error(
                    f"prompt {prompt!r} is asked for with several seeds, and the CSV has one picture of it",
                    hint="ask for one picture a prompt, or list more of them with their seeds",
                )
            return name
        if seed not in pictures:
            raise Error(
                f"prompt {prompt!r} has {len(pictures)} pictures, none of seed {seed}",
                hint="keep one picture a prompt, or give the seeds that are asked for in the column seed",
            )
        return pictures[seed]


def _read_prompts(path: Path, names: frozenset[str]) -> dict[str, dict[int | None, str]]:
    """prompt -> {seed: name}; the one picture of a prompt may have no seed."""
    found: dict[str, dict[int | None, str]] = {}
    hint = "the columns are name, prompt and, where a prompt has several pictures, seed"
    try:
        reader = csv.DictReader(io.StringIO(images.read_bytes(path).decode("utf-8-sig"), newline=""), strict=True)
        if not {"name", "prompt"} <= set(reader.fieldnames or ()):
            raise Error(f"{path} lacks the column name or prompt", hint=hint)
        for row in reader:
            at = f"{path}:{reader.line_num}"
            name, prompt, text = row["name"], row["prompt"], row.get("seed")
            if name not in names:
                hint = "names are relative paths below the folder"
                raise Error(f"{at}: there is no picture {brief(name)!r}", hint=hint)
            if prompt is None or (text and not re.fullmatch(r"[0-9]{1,19}", text)):
                raise Error(f"{at}: {'prompt is missing' if prompt is None else f'seed {brief(text)!r}'}", hint=hint)
            pictures = found.setdefault(prompt, {})
            seed = int(text) if text else None
            if seed in pictures or (pictures and None in (seed, *pictures)):
                raise Error(f"{at}: prompt {brief(prompt)!r} has two pictures that no seed tells apart", hint=hint)
            pictures[seed] = name
    except (UnicodeDecodeError, csv.Error) as e:
        raise Error(f"{path} is no CSV file in UTF-8: {e}", hint=hint) from None
    if not found:
        raise Error(f"{path} names no picture", hint=hint)
    return found
