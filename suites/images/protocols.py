"""What exactly is compared between two sets of pictures: the definitions that papers publish their numbers under.

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
    """Which numbers, on which features. The first three fields describe it; the others decide values.

    Fields that name an extractor are "" where the number is not reported. Pictures reach it as 8 bits.
    """

    name: str
    source: str  # where the definition was read
    departs: str = ""  # what the peer does and we do not

    frechet: str = ""  # extractor
    spatial: str = ""  # a second one, for sFID
    covariance: Literal["unbiased", "biased"] = "unbiased"
    kid: str = ""
    kid_protocol: Literal["all-pairs", "subsets"] = "all-pairs"  # or torch-fidelity's 100 subsets of 1,000
    prdc: str = ""
    k: int = 5  # neighbours
    radius: Literal["<", "<="] = "<"  # is a point on the sphere inside? prdc's convention, or torch-fidelity's
    cmmd: str = ""
    inception_score: str = ""  # an extractor's logits
    splits: Literal["hash", "torch-fidelity", "guided-diffusion"] = "hash"  # of the Inception score

    def definition(self) -> dict:
        """The fields that decide values."""
        return {k: v for k, v in asdict(self).items() if k not in ("name", "source", "departs")}

    def hash(self) -> str:
        """12 hex digits of SHA-256 over the canonical JSON of the definition: equal hashes, comparable values."""
        text = json.dumps(self.definition(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def extractors(self) -> list[str]:
        """Every network that is asked for, once."""
        named = (self.frechet, self.spatial, self.kid, self.prdc, self.cmmd, self.inception_score)
        return list(dict.fromkeys(name for name in named if name))


ALL_PAIRS = "KID is of all pairs, which the peer's mean over random subsets estimates"

PRESETS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(
            name="embedded",
            source="the feature network that comes with the harness: every distance that needs no download",
            departs="no number here is comparable with a paper's",
            frechet="embedded",
            kid="embedded",
            prdc="embedded",
            cmmd="embedded",
        ),
        Protocol(
            name="world",
            source="the judges of the drawn world that come with the harness; the Inception score is of its shapes",
            departs="no number here is comparable with a paper's; pictures are brought to 32 px",
            frechet="mini-classifier",
            kid="mini-classifier",
            prdc="mini-classifier",
            cmmd="mini-clip",
            inception_score="mini-classifier/logits",
        ),
        Protocol(
            name="clean",
            source="GaParmar/clean-fid 0.1.35, compute_fid and compute_kid, mode clean",
            departs="the peer draws its subsets for KID from the global generator; ours are torch-fidelity's",
            frechet="inception-clean",
            kid="inception-clean",
            kid_protocol="subsets",
        ),
        Protocol(
            name="legacy-tf",
            source="bioinf-jku/TTUR, fid.py; clean-fid calls it legacy_tensorflow",
            frechet="inception-tf1",
        ),
        Protocol(
            name="torch-fidelity",
            source="toshas/torch-fidelity 0.4.0, defaults of --isc --fid --kid --prc",
            departs="precision and recall are on Inception, the peer's default network for them is VGG16",
            frechet="inception-tf1",
            kid="inception-tf1",
            kid_protocol="subsets",
            prdc="inception-tf1",
            k=3,
            radius="<=",
            inception_score="inception-tf1/logits",
            splits="torch-fidelity",
        ),
        Protocol(
            name="adm",
            source="openai/guided-diffusion, evaluations/evaluator.py",
            departs="the peer's graph runs in TensorFlow, its distances for precision in float16",
            frechet="inception-tf1",
            spatial="inception-tf1/spatial",
            prdc="inception-tf1",
            k=3,
            radius="<=",
            inception_score="inception-tf1/logits",
            splits="guided-diffusion",
        ),
        Protocol(
            name="dinov2",
            source="layer6ai-labs/dgm-eval: FD-DINOv2, KD and PRDC on DINOv2 ViT-L/14",
            departs=ALL_PAIRS,
            frechet="dinov2-vitl14",
            kid="dinov2-vitl14",
            prdc="dinov2-vitl14",
        ),
        Protocol(
            name="cmmd",
            source="google-research/cmmd and sayakpaul/cmmd-pytorch: CLIP ViT-L/14 at 336 px",
            cmmd="clip-vitl14-336",
        ),
    )
}


def get(name: str) -> Protocol:
    """The preset of a name; ValueError with a suggestion for an unknown one."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, 1)
    raise ValueError(f"protocol {name!r} is unknown" + (f"; did you mean {close[0]!r}?" if close else ""))
