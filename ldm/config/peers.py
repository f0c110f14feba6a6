"""The settings of the closed forms of others, UCE and SPEED, which edit keys and values of cross-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ldm.config.method import ANCHORS, MethodConfig
from ldm.config.settings import setting


@dataclass(frozen=True)
class PeerConfig(MethodConfig):
    """What UCE and SPEED share: what stands for a concept, what takes its place, and what is preserved beside it."""

    anchor: str | None = setting(
        None,
        "what takes the place of a concept: the empty prompt, its category's anchor, a neutral word, or by default "
        "what the authors take, art for a style and the empty prompt for all else",
        choices=ANCHORS,
    )
    rows: str = setting(
        "last",
        "which rows of its embedding stand for a prompt: that of its last token, from there on to the end, or all",
        choices=("last", "end", "all"),
    )
    preserve_templates: int = setting(0, "caption templates to preserve beside each concept's name", minimum=0)
    preserve_captions: int = setting(0, "everyday captions to preserve", minimum=0)
    preserve_always: bool = setting(False, "preserve the empty prompt and the watermarks too")


@dataclass(frozen=True)
class UCEConfig(PeerConfig):
    """UCE, Unified Concept Editing (arXiv 2308.14761); the defaults are its authors' script's."""

    name: ClassVar[str] = "UCE"

    lamb: float = setting(0.5, "lambda, the weight of |dW|^2", above=0)
    erase_scale: float = setting(1.0, "weight of each row of the erased concept", above=0)
    preserve_scale: float = setting(1.0, "weight of each row that is preserved", minimum=0)
    expand_prompts: bool = setting(False, "erase five phrases that say the concept beside its name")


@dataclass(frozen=True)
class SPEEDConfig(PeerConfig):
    """SPEED (arXiv 2503.07392); the defaults are those of its few-concept erasure."""

    name: ClassVar[str] = "SPEED"

    layers: str = setting("values", "which layers are edited", choices=("values", "keys", "both"))
    null_threshold: float = setting(
        0.1, "singular value of the retain set's mean c c^T below which a direction is free", above=0
    )
    filter_retained: bool = setting(
        True, "keep of the retain set what erasing shifts most, and variants of that; otherwise all of it as it is"
    )
    augmentations: int = setting(10, "variants of each row of the retain set", minimum=0)
    augment_rank: int = setting(1, "directions in which variants differ, those that a layer shrinks most", minimum=1)
    null_text_rows: int = setting(3, "centroids of the empty prompt's rows that no change moves", minimum=1)
    seed: int = setting(0, "what the variants are chosen from")
