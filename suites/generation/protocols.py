"""What exactly is measured of pictures that were made from prompts: definitions to publish numbers under.

Nothing of the harness is needed here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Protocol:
    """Which numbers, by which networks. The first three fields describe it; the others decide values.

    Fields that name an extractor or a judge are "" where the number is not reported. Pictures reach it as 8 bits.
    """

    name: str
    source: str  # where the definition was read
    departs: str = ""  # what the peer does and we do not

    frechet: str = ""  # extractor
    kid: str = ""
    kid_protocol: Literal["all-pairs", "subsets"] = "all-pairs"  # or torch-fidelity's 100 subsets of 1,000
    prdc: str = ""
    k: int = 5  # neighbours
    cmmd: str = ""
    inception_score: str = ""  # an extractor's logits
    clip: str = ""  # extractor with a text tower
    diversity: str = ""  # extractor
    judge: Literal["", "world", "geneval"] = ""  # who says whether a picture shows what its prompt asks for

    def definition(self) -> dict:
        """The fields that decide values."""
        return {k: v for k, v in asdict(self).items() if k not in ("name", "source", "departs")}

    def hash(self) -> str:
        """12 hex digits of SHA-256 over the canonical JSON of the definition: equal hashes, comparable values."""
        text = json.dumps(self.definition(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def compares(self) -> bool:
        """Is there a number that needs reference pictures?"""
        return bool(self.frechet or self.kid or self.prdc or self.cmmd or self.judge == "world")


PRESETS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(
            name="world",
            source="the classifier and the CLIP of the drawn world that come with the harness: nothing to download",
            departs="no number here is comparable with a paper's; pictures are brought to 32 px",
            frechet="mini-classifier",
            kid="mini-classifier",
            prdc="mini-classifier",
            cmmd="mini-classifier",
            inception_score="mini-classifier/logits",
            clip="mini-clip",
            diversity="mini-classifier",
            judge="world",
        ),
        Protocol(
            name="coco-30k",
            source="FID and KID of clean-fid 0.1.35, CLIP score of torchmetrics with its default, CLIP ViT-L/14",
            departs="which 30,000 captions, and how photographs are cut square, differs from paper to paper",
            frechet="inception-clean",
            kid="inception-clean",
            kid_protocol="subsets",
            clip="clip-vitl14",
            diversity="inception-clean",
        ),
        Protocol(
            name="geneval",
            source="djghosh13/geneval, evaluation/evaluate_images.py and summary_scores.py (Ghosh et al. 2023)",
            departs="the detector is the user's; the peer's is Mask2Former Swin-S with CLIP ViT-L/14 for colours",
            judge="geneval",
        ),
    )
}


def get(name: str) -> Protocol:
    """The preset of a name; ValueError with a suggestion for an unknown one."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, 1)
    raise ValueError(f"protocol {name!r} is unknown" + (f"; did you mean {close[0]!r}?" if close else ""))
