"""The settings of every method and of what surrounds it: one frozen dataclass each, whose fields carry their help.

A field, a YAML key and a flag are the same name. The defaults are those of the paper (arXiv 2402.05947) for Stable
Diffusion v1; a model's YAML is merged over them (`ldm.config.models`), and what a user types over that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ldm.config.method import ANCHORS, MethodConfig, TrainedConfig
from ldm.config.peers import SPEEDConfig, UCEConfig
from ldm.config.settings import Settings, setting

TRAIN_METHODS = ("xattn", "noxattn", "selfattn", "full", "notime", "xlayer", "selflayer")
LINEAR_FORMATS = ("compvis", "lora", "kohya", "unet", "diffusers")
SHARED_FORMATS = ("shift",)  # of changes of embeddings, with their gates
CUT_FORMATS = ("lora", "kohya", "shift")  # one file a concept, of few directions
GATED_FORMATS = ("comfyui",)
FORMATS = LINEAR_FORMATS + SHARED_FORMATS + GATED_FORMATS  # in the order in which they are written
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SRSMEConfig(TrainedConfig):
    """SRS-ME (arXiv 2402.05947): a shift inside the null space, in closed form, trained, or both."""

    name: ClassVar[str] = "SRS-ME"
    needs_null_space: ClassVar[bool] = True

    mode: str = setting(
        "learn",
        "stop at the closed form, train by gradient, or make a gate alone, which changes no weights and whose number "
        "has no bound",
        choices=("closed_form", "learn", "gate"),
    )
    init: str = setting("zero", "what a shift starts from", choices=("closed_form", "zero"))
    ridge_weight: float = setting(0.003, "weight of |dW|^2, relative to the concept's projection", above=0)
    preserve_scale: float = setting(
        0.0, "weight of how far protected prompts' outputs change, where the tolerance lets them", minimum=0
    )
    vocab_preserve_scale: float = setting(
        0.0, "weight of how far the outputs of the vocabulary's words change, other than the concept's own", minimum=0
    )
    captions_preserve_scale: float = setting(0.0, "the same weight for everyday captions", minimum=0)
    neutral_preserve_scale: float = setting(
        0.0,
        "the same for prompts that say a neutral word, such as an artist, where the concept's say its name",
        minimum=0,
    )
    others_preserve_scale: float = setting(
        0.0, "the same for prompts that say the category's other concepts, captions with them included", minimum=0
    )
    retain_preserve_scale: float = setting(10.0, "the same for the prompts of retain, the user's own", minimum=0)
    anchor: str = setting(
        "empty",
        "what the closed form makes of the concept: the empty prompt, its category's anchor, or each prompt with a "
        "neutral word instead of the name",
        choices=ANCHORS,
    )
    target_templates: int = setting(0, "caption templates to erase beside the concept's name", minimum=0)
    template_set: str = setting(
        "category",
        "whose templates say the concept: its category's, or those of its kind in configs/templates.yaml, in all "
        "spellings",
        choices=("category", "kind"),
    )
    max_directions: int | None = setting(
        691, "max number of basis vectors, those with the largest projection of the concept first", minimum=1
    )
    basis_scale: float = setting(1e-4, "beta, the scale of the null space's basis")
    lr: float = setting(0.1, "Adam's learning rate", above=0, training_only=True)
    l1_weight: float = setting(1e-6, "weight of |dW|_1", training_only=True)
    stop_threshold: float = setting(1e-4, "stop when the momentum of the correlation falls to it", training_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1e-30 <= abs(self.basis_scale) <= 1e30:
            raise ValueError(f"`basis_scale` {self.basis_scale:g} is not a number from 1e-30 to 1e30, such as 1e-4")

    @property
    def trains(self) -> bool:
        return self.mode == "learn"

    @property
    def makes_gates_alone(self) -> bool:
        return self.mode == "gate"


@dataclass(frozen=True)
class JointSRSMEConfig(SRSMEConfig):
    """SRS-ME-dagger: all concepts' shifts trained at once, their losses balanced."""

    name: ClassVar[str] = "SRS-ME-dagger"
    is_joint: ClassVar[bool] = True


@dataclass(frozen=True)
class FinetuneConfig(TrainedConfig):
    """What the methods share that train the U-Net's own weights."""

    train_method: str = setting("xattn", "which weights to train", choices=TRAIN_METHODS)


@dataclass(frozen=True)
class FullCorrelationConfig(FinetuneConfig):
    """SRS-ME-double-dagger: SRS-ME's loss on all cross-attention weights, without a null space."""

    name: ClassVar[str] = "SRS-ME-double-dagger"

    lr: float = setting(1e-6, "Adam's learning rate", above=0, training_only=True)
    l1_weight: float = setting(1e-5, "weight of |dW|_1", training_only=True)
    stop_threshold: float = setting(
        5e-5, "stop when the momentum of the correlation, with what repels, falls to it", training_only=True
    )
    repel_weight: float = setting(
        0.0,
        "weight of what keeps an erased prompt from the watermarks",
        minimum=0,
        training_only=True,
    )


@dataclass(frozen=True)
class ForgetMeNotConfig(FinetuneConfig):
    """FMN, Forget-Me-Not (arXiv 2303.17591)."""

    name: ClassVar[str] = "FMN"

    max_steps: int = setting(50, "max number of iterations", minimum=1, training_only=True)


@dataclass(frozen=True)
class AblatingConceptsConfig(FinetuneConfig):
    """AbConcept, Ablating Concepts (arXiv 2303.13516)."""

    name: ClassVar[str] = "AbConcept"

    max_steps: int = setting(75, "max number of iterations", minimum=1, training_only=True)


@dataclass(frozen=True)
class SelfSampledConfig(FinetuneConfig):
    """What the methods share whose training latents are sampled by the model that is being trained."""

    needs_images: ClassVar[bool] = False

    start_guidance: float = setting(3.0, "guidance with which the training latents are sampled")
    num_inference_steps: int = setting(50, "sampler steps of the training latents", minimum=1)


@dataclass(frozen=True)
class ESDConfig(SelfSampledConfig):
    """ESD, Erased Stable Diffusion (arXiv 2303.07345)."""

    name: ClassVar[str] = "ESD"

    negative_guidance: float = setting(1.0, "eta, how far to turn away from the concept")


METHODS: dict[str, type[MethodConfig]] = {
    kind.name: kind
    for kind in (
        SRSMEConfig,
        JointSRSMEConfig,
        FullCorrelationConfig,
        ForgetMeNotConfig,
        AblatingConceptsConfig,
        ESDConfig,
        UCEConfig,
        SPEEDConfig,
    )
}


def complete_settings(method: str, written: Mapping[str, Any]) -> dict[str, Any]:
    """Return a shift's settings as its file says them, with the defaults of those that were not there by then.

    What acts only in training is not added, since a file that does not name it was not trained.
    """
    entries = fields(METHODS[method])
    return {entry.name: entry.default for entry in entries if not entry.metadata["training_only"]} | dict(written)


def complete_gate_settings(written: Mapping[str, Any]) -> dict[str, Any]:
    """Return a gate's settings as its file says them, with what acted before they had a name."""
    return {"word_lists": 0} | dict(written)


@dataclass(frozen=True)
class NullSpaceConfig(Settings):
    """How the null space of the protected prompts is found."""

    null_space_method: str = setting("svd", "how to decompose", choices=("svd", "elimination"))
    rank_rtol: float = setting(1e-7, "relative size of a singular value that counts as zero", minimum=0)
    protected_templates: int = setting(0, "caption templates to protect beside each concept's name", minimum=0)
    always_protected_weight: float = setting(
        1.0,
        "weight of the empty prompt and the watermarks, which are always protected, against that of a concept",
        above=0,
    )


@dataclass(frozen=True)
class EditConfig(Settings):
    """How shifts act where nothing needs static weights."""

    form: str = setting(
        "gated",
        "let shifts act on the prompts that trip their gates, or on the weights",
        choices=("gated", "linear"),
    )
    least_effect: float = setting(
        0.7, "how far prompts that say a concept go to what takes its place, 0 to 1, where it is called erased"
    )


@dataclass(frozen=True)
class GateConfig(Settings):
    """How a shift's gate is fitted: what tells the prompts that say its concept, and what they become."""

    gate: bool = setting(True, "give shifts a gate beside their change of weights")
    gate_anchor: str = setting(
        "neutral",
        "what prompts that say the concept become: the same with a neutral word, or the empty prompt",
        choices=("neutral", "empty"),
    )
    gate_position: float = setting(0.7, "where in the gap the threshold lies, 0 to 1", minimum=0)
    gate_ridge: float = setting(0.01, "ridge of the discriminant, relative to the covariance", above=0)
    map_ridge: float = setting(0.001, "ridge of the map, relative to the largest projection", above=0)
    map_rank: int = setting(64, "directions in which the map is solved", minimum=1)
    max_map_rank: int = setting(18, "directions that the map has at most after that, whatever it loses", minimum=1)
    map_loss: float = setting(
        0.03,
        "of the way to the anchor, what a map of fewer directions may leave more than one of all of them",
        minimum=0,
    )
    retain_captions: int = setting(1500, "everyday captions that trip no gate", minimum=1)
    retain_words: int = setting(750, "words of the vocabulary that trip no gate", minimum=1)
    compositions: int = setting(80, "everyday captions with the concept in them that trip it", minimum=0)
    word_lists: int = setting(
        240, "lists of the vocabulary's words with the concept among them that trip it", minimum=0
    )
    misspellings: int = setting(60, "misspelt names of each concept that may trip it", minimum=0)
    misspelling_clearance: float = setting(
        0.35, "how far above every other prompt a misspelt name has to be, in units of the concept's distance", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gate_position < 1:
            raise ValueError(f"`gate_position` {self.gate_position:g} is outside (0, 1): give a fraction, such as 0.7")


NO_GATE = GateConfig(gate=False)


@dataclass(frozen=True)
class SamplingConfig(Settings):
    """How images are generated."""

    num_inference_steps: int = setting(50, "sampler steps", minimum=1)
    guidance_scale: float = setting(7.5, "classifier-free guidance")
    sample_batch_size: int = setting(4, "images at once", minimum=1)


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """How much an experiment generates."""

    seeds_per_prompt: int = setting(50, "images of each prompt for each set of weights", minimum=1)
    num_training_images: int = setting(50, "images to train each erasure on", minimum=1)
    unprotected_prompts: int = setting(
        10, "prompts of each group that nothing protects: captions, words, kin, ...; 0 for none", minimum=0
    )


@dataclass(frozen=True)
class ExecutionConfig(Settings):
    """How an iteration is computed, which is not what it computes."""

    frozen_device: str | None = setting(None, "another device for the passes without gradient")
    gradient_checkpointing: bool = setting(False, "less memory for a third more time")


@dataclass(frozen=True)
class ExportConfig(Settings):
    """In which formats weights are written, and how."""

    formats: tuple[str, ...] = setting(
        ("diffusers",),
        f"one or more of {','.join(FORMATS)}, with commas between them; unet is the denoiser alone, of any family; "
        "shift is a small file to share, with a card; it, lora and kohya are always cut to few directions, see rank; "
        "comfyui is a custom node with the shifts' gates, whatever rank and save_dtype are",
    )
    save_dtype: str = setting(
        "float32",
        "what the weights are written in; a compvis checkpoint keeps its own unless this is a half",
        choices=DTYPES,
    )
    rank: int | str | None = setting(
        None,
        "directions that each shift keeps, or auto for the fewest with effect_fraction of its effect; without it "
        "lora, kohya and shift are cut as by auto, often to a single direction, and merged weights keep all: give a "
        "rank for the same erasure in both",
        minimum=1,
    )
    effect_fraction: float = setting(
        0.85,
        "fraction of the effect on the concept's own prompts to keep, for an automatic rank, which lora, kohya and "
        "shift have without one; the table's truncation_error is what is missing",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise ValueError(f"'{(unknown or [''])[0]}' is no format: choose from {', '.join(FORMATS)}")
        if not 0 < self.effect_fraction <= 1:
            raise ValueError(
                f"`effect_fraction` {self.effect_fraction} is outside (0, 1]: give a fraction of the effect, "
                "such as 0.85"
            )
        if isinstance(self.rank, str) and self.rank != "auto":
            raise ValueError(f"`rank` '{self.rank}' is neither a whole number from 1 nor auto")
