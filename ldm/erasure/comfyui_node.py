"""A ComfyUI node whose CLIP leaves concepts out of the prompts that say them, by the gates in the file beside it.

A gate reads a hidden state of the text encoder. Where it fires, the rows of the prompt's embedding become those of its
anchor, e -> e + A S e, before ComfyUI weighs the words; what several concepts make of a prompt is one joined map. Every
other prompt keeps every bit. An export copies this module: it needs torch, safetensors, and what ComfyUI hands it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open

GATES_FILE = "gates.safetensors"
METADATA_KEY = "srs-me"  # of the file's header
LAST_STATE = -1  # what the denoiser is given, among the numbers of layers
POOLED_ENCODER = "clip_g"  # whose pooled embedding XL's denoiser is given

_FOLDER = Path(__file__).parent
JOINED_SCALE = 1.4  # of the map of several concepts that a prompt says together
_RELATIVE_ZERO = 1e-6

States = Mapping[tuple[str, int], torch.Tensor]  # by text encoder and layer: (N, T, width of that encoder)


@dataclass(frozen=True)
class EmbeddingMap:
    """`e -> e + A S e`: A (d, k), orthonormal S (k, d), and the normal equations of A: `gram` (k, k), `penalty`."""

    outputs: torch.Tensor
    directions: torch.Tensor
    gram: torch.Tensor
    penalty: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what the map makes of rows (..., d), in their own dtype."""
        precise = rows.double()
        return (precise + precise @ self.directions.T @ self.outputs.T).to(rows.dtype)


def join_maps(maps: Sequence[EmbeddingMap]) -> EmbeddingMap:
    """Return the one map that is fitted on the rows of all `maps`, from their normal equations."""
    if len(maps) == 1:
        return maps[0]
    _, values, vh = torch.linalg.svd(torch.cat([each.directions for each in maps]), full_matrices=False)
    directions = vh[values > _RELATIVE_ZERO]  # (q, d)
    penalty = max(each.penalty for each in maps)
    gram = penalty * torch.eye(len(directions), dtype=torch.float64)
    cross = torch.zeros(directions.shape[1], len(directions), dtype=torch.float64)  # (d, q)
    for each in maps:
        turned = each.directions @ directions.T  # (k, q)
        own = each.gram - each.penalty * torch.eye(len(each.gram), dtype=torch.float64)
        gram += turned.T @ own @ turned
        cross += each.outputs @ each.gram @ turned
    return EmbeddingMap(torch.linalg.solve(gram, cross.T).T, directions, gram, penalty)


@dataclass(frozen=True)
class ConceptEdit:
    """What erases a concept: gates by text encoder, the layers that they read, and a map of each stream.

    A gate is directions (g, width) and thresholds (g,). Streams are `tokens`, and of XL `pooled`.
    """

    name: str
    gates: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    layers: Mapping[str, int]
    maps: Mapping[str, EmbeddingMap]

    def margins(self, states: States) -> torch.Tensor:
        """Return whether each prompt trips a gate, (N,): above 0 where it does. How far says little: units differ."""
        found = []
        for name, (weights, thresholds) in self.gates.items():
            scores = states[name, self.layers[name]] @ weights.T  # (N, T, g)
            found.append((scores.amax(1) - thresholds).amax(1))
        return torch.stack(found).amax(0)


@dataclass(frozen=True)
class Gates:
    """The concepts of a file, and the text encoders that they belong to, by ComfyUI's names.

    `encoders` are in the order of an embedding's columns, `widths` are their sizes, and `output_layers` are the numbers
    of the layers whose outputs the denoiser is given.
    """

    base_model: str
    base_digest: str
    encoders: Sequence[str]
    widths: Mapping[str, int]
    output_layers: Mapping[str, int]
    concepts: Sequence[ConceptEdit]

    @classmethod
    def read(cls, path: Path) -> Gates:
        """Return what an export wrote into a file."""
        with safe_open(path, framework="pt") as opened:
            header = json.loads(opened.metadata()[METADATA_KEY])["metadata"]
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
        concepts = [_read_concept(tensors, number, said) for number, said in enumerate(header["concepts"])]
        model = {name: header[name] for name in ("base_model", "base_digest", "encoders", "widths", "output_layers")}
        return cls(**model, concepts=concepts)

    def select(self, text: str) -> Gates:
        """Return those of the concepts that `text` names, separated by commas; `all` names each of them."""
        typed = [piece.strip() for piece in text.split(",") if piece.strip()]
        wanted = [name.casefold() for name in typed]
        names = ", ".join(concept.name for concept in self.concepts)
        if not wanted:
            raise ValueError(f"concepts is empty: write all, or some of {names}; to erase nothing bypass this node")
        known = {"all", *(concept.name.casefold() for concept in self.concepts)}
        unknown = ", ".join(name for name in typed if name.casefold() not in known)
        if unknown:
            raise ValueError(f"concepts: there is no gate of {unknown}: write all, or some of {names}")
        chosen = [each for each in self.concepts if "all" in wanted or each.name.casefold() in wanted]
        return replace(self, concepts=chosen)

    def joined(self, earlier: Gates) -> Gates:
        """Return the concepts of another such node before this one and these together."""
        if earlier.base_digest != self.base_digest:
            raise ValueError(
                f"this CLIP has gates of {earlier.base_model} already, and these are of {self.base_model}: use one node"
            )
        names = {concept.name for concept in self.concepts}
        before = [concept for concept in earlier.concepts if concept.name not in names]
        return replace(self, concepts=[*before, *self.concepts])

    def layers(self, encoder: str) -> set[int]:
        """Return the hidden states of a text encoder that gates read."""
        return {concept.layers[encoder] for concept in self.concepts if encoder in concept.layers}


def _read_concept(tensors: Mapping[str, torch.Tensor], number: int, said: Mapping[str, Any]) -> ConceptEdit:
    """Return the concept of a file's tensors whose names begin with `number`, and of what the header says of it."""
    gates: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in said["layers"]:
        weights, thresholds = (tensors[f"{number}.gate.{name}.{part}"].float() for part in ("weights", "thresholds"))
        gates[name] = (weights, thresholds)
    maps: dict[str, EmbeddingMap] = {}
    for stream, penalty in said["penalties"].items():
        parts = {part: tensors[f"{number}.map.{stream}.{part}"].double() for part in ("outputs", "directions", "gram")}
        maps[stream] = EmbeddingMap(**parts, penalty=penalty)
    return ConceptEdit(said["name"], gates, said["layers"], maps)


@dataclass
class Recording:
    """What a text encoder returned for some prompts, before words are weighed, and its hidden states by layer.

    An output is the embeddings (N, T, width), the pooled ones (N, p) or None, and whatever ComfyUI has beside them.
    """

    outputs: list[tuple[Any, ...]] = field(default_factory=list)
    states: dict[int, torch.Tensor] = field(default_factory=dict)


@contextmanager
def replace_encode(encoder: Any, encode: Callable[[Any], Any]) -> Generator[None]:
    """Let a text encoder's `encode` be another while the block runs; then the one before is back."""
    before = vars(encoder).get("encode")  # not the class's: what another node has put there
    encoder.encode = encode
    try:
        yield
    finally:
        if before is None:
            del encoder.encode
        else:
            encoder.encode = before


@contextmanager
def record(encoder: Any, layers: Collection[int]) -> Generator[Recording]:
    """Collect what a text encoder's `encode` returns while the block runs, and the outputs of `layers`, from 0."""
    found, plain = Recording(), encoder.encode

    def encode(tokens: Any) -> Any:
        output = plain(tokens)
        # Copies, since ComfyUI weighs the words in place.
        copied = (part.detach().clone() if isinstance(part, torch.Tensor) else part for part in output)
        found.outputs.append(tuple(copied))
        return output

    def make_hook(number: int) -> Callable[..., None]:
        def keep(_: Any, inputs: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            found.states[number] = state.detach().clone()  # since ComfyUI's next layer adds to it in place

        return keep

    with ExitStack() as stack:
        for number in layers:
            if number != LAST_STATE:
                stack.callback(_layers(encoder)[number].register_forward_hook(make_hook(number)).remove)
        stack.enter_context(replace_encode(encoder, encode))
        yield found


def _layers(encoder: Any) -> Sequence[Any]:
    """Return the layers of one of ComfyUI's text encoders, in order."""
    for module in encoder.transformer.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == encoder.num_layers:
            return list(module)
    raise ValueError(f"this text encoder has no list of {encoder.num_layers} layers, whose outputs a gate could read")


class GatedTextEncoders:
    """A CLIP's text encoders, ComfyUI's `cond_stage_model`, without concepts; all but encoding is as it was."""

    def __init__(self, wrapped: Any, gates: Gates):
        self.wrapped, self.srs_me_gates = wrapped, gates
        self._joined: dict[tuple[int, ...], dict[str, EmbeddingMap]] = {}
        found = {name: child for name, child in wrapped.named_children() if hasattr(child, "encode_token_weights")}
        names, own = ", ".join(sorted(gates.encoders)), ", ".join(sorted(found)) or "none that this node knows"
        if names != own:
            raise ValueError(
                f"these gates read {names} of {gates.base_model}, and this CLIP has {own}: load {gates.base_model}"
            )
        self._encoders: dict[str, Any] = {name: found[name] for name in gates.encoders}
        for name, encoder in self._encoders.items():
            width = encoder.transformer.get_input_embeddings().weight.shape[-1]
            if width != gates.widths[name]:
                raise ValueError(
                    f"these gates read states of {gates.widths[name]} numbers of {gates.base_model}, and those of this "
                    f"CLIP's {name} have {width}: load {gates.base_model}"
                )

    def __getattr__(self, name: str) -> Any:
        """Return what the wrapped encoders have of that name; a text encoder is gated then too."""
        if name in ("wrapped", "_encoders"):  # of a copy that is not made yet
            raise AttributeError(name)
        found = getattr(self.wrapped, name)
        return GatedTextEncoder(self, found) if name in self._encoders else found

    def encode_token_weights(self, tokens: Mapping[str, Sequence[Any]]) -> Any:
        """Return what ComfyUI makes of a prompt: of each text encoder's tokens, with weights, in sections."""
        sections = min(len(found) for found in tokens.values())
        return self.gated(lambda: self.wrapped.encode_token_weights(tokens), sections)

    def gated(self, call: Callable[[], Any], sections: int) -> Any:
        """Return what `call` returns, each of whose `sections` is a prompt; one more is the empty one for weights."""
        self._check_options()
        with ExitStack() as stack:
            found: dict[str, Recording] = {}
            for name, encoder in self._encoders.items():
                found[name] = stack.enter_context(record(encoder, self.srs_me_gates.layers(name)))
            plain = call()
        if any(len(each.outputs) != 1 for each in found.values()):
            raise ValueError(
                "SRS-ME's gates need each text encoder to encode a prompt once, together: encode it by CLIP Text Encode"
            )
        outputs = self._edit(found, sections)
        if outputs is None:
            return plain  # as if there were no gate
        with ExitStack() as stack:
            for name, encoder in self._encoders.items():
                stack.enter_context(replace_encode(encoder, lambda _, output=outputs[name]: output))
            return call()  # which weighs the words; no text encoder runs

    def _check_options(self) -> None:
        """Raise ValueError unless the text encoders return what the maps were fitted on."""
        for name, encoder in self._encoders.items():
            expected, number = self.srs_me_gates.output_layers[name] - encoder.num_layers, encoder.num_layers
            is_known = encoder.layer in ("last", "hidden")
            layer = encoder.layer_idx if encoder.layer == "hidden" else -1
            if not is_known or layer % number != expected % number:
                raise ValueError(
                    f"{name} stops at layer {layer if is_known else encoder.layer}, and these gates are for "
                    f"{expected}: set stop_at_clip_layer of CLIP Set Last Layer to {expected}, or leave that node out"
                )
        has_pooled = "pooled" in self.srs_me_gates.concepts[0].maps
        if has_pooled and not self._encoders[POOLED_ENCODER].return_projected_pooled:
            raise ValueError("these gates are for the projected pooled embedding, and this prompt has another")

    def _edit(self, found: Mapping[str, Recording], sections: int) -> dict[str, tuple[Any, ...]] | None:
        """Return the text encoders' outputs with those of prompts that trip a gate mapped; None where none does."""
        gates = self.srs_me_gates
        states: dict[tuple[str, int], torch.Tensor] = {}
        for name, recording in found.items():
            for number in gates.layers(name):
                state = recording.outputs[0][0] if number == LAST_STATE else recording.states[number]
                states[name, number] = state[:sections].float().cpu()
        margins = [concept.margins(states).tolist() for concept in gates.concepts]
        fired = [tuple(k for k, found in enumerate(margins) if found[section] > 0) for section in range(sections)]
        if not any(fired):
            return None
        outputs = {name: recording.outputs[0] for name, recording in found.items()}
        for section, numbers in enumerate(fired):
            if numbers:
                self._map(outputs, section, self._joined_maps(numbers))
        return outputs

    def _joined_maps(self, numbers: tuple[int, ...]) -> dict[str, EmbeddingMap]:
        """Return the one map of each stream that several concepts are together."""
        if numbers not in self._joined:
            chosen = [self.srs_me_gates.concepts[number] for number in numbers]
            streams = chosen[0].maps
            joined = {stream: join_maps([each.maps[stream] for each in chosen]) for stream in streams}
            scale = JOINED_SCALE if len(chosen) > 1 else 1.0
            self._joined[numbers] = {
                stream: replace(found, outputs=scale * found.outputs) for stream, found in joined.items()
            }
        return self._joined[numbers]

    def _map(self, outputs: Mapping[str, tuple[Any, ...]], section: int, maps: Mapping[str, EmbeddingMap]) -> None:
        """Map a section's rows in place. On the CPU: not every device has numbers of 64 bits."""
        rows = torch.cat([outputs[name][0][section].cpu() for name in self._encoders], dim=-1)  # (T, d)
        widths = [self.srs_me_gates.widths[name] for name in self._encoders]
        for name, columns in zip(self._encoders, maps["tokens"](rows).split(widths, dim=-1), strict=True):
            outputs[name][0][section] = columns
        if "pooled" in maps:
            pooled = outputs[POOLED_ENCODER][1]
            more = len(maps["pooled"].outputs) - pooled.shape[-1]  # that older files have
            row = F.pad(pooled[section].cpu(), (0, more))
            pooled[section] = maps["pooled"](row[None])[0, : pooled.shape[-1]]


class GatedTextEncoder:
    """One of the text encoders, for nodes that use it by itself; all but encoding is as it was."""

    def __init__(self, owner: GatedTextEncoders, wrapped: Any):
        self.owner, self.wrapped = owner, wrapped

    def __getattr__(self, name: str) -> Any:
        if name == "wrapped":  # of a copy that is not made yet
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def encode_token_weights(self, tokens: Sequence[Any]) -> Any:
        """Return what ComfyUI makes of a prompt's tokens with weights, in sections."""
        return self.owner.gated(lambda: self.wrapped.encode_token_weights(tokens), len(tokens))

    def encode(self, tokens: Sequence[Any]) -> Any:
        """Return what ComfyUI makes of prompts' tokens."""
        return self.owner.gated(lambda: self.wrapped.encode(tokens), len(tokens))


class EraseConcepts:
    """The node: a CLIP in, and one out that leaves out concepts. The one that comes in is not changed."""

    CATEGORY = "conditioning"
    DESCRIPTION = "Leaves concepts out of the prompts that say them; every other prompt stays as it is."
    FUNCTION = "erase"
    RETURN_TYPES = ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # ComfyUI's name
        """Return what the node takes."""
        tooltip = "which concepts to erase, separated by commas, or all; README.txt beside the node lists them"
        return {"required": {"clip": ("CLIP",), "concepts": ("STRING", {"default": "all", "tooltip": tooltip})}}

    def erase(self, clip: Any, concepts: str) -> tuple[Any]:
        """Return a clone of the CLIP that leaves out `concepts`, beside those of such a node before it."""
        gates = Gates.read(_FOLDER / GATES_FILE).select(concepts)
        encoders = clip.cond_stage_model
        earlier = getattr(encoders, "srs_me_gates", None)  # by its name: each folder has classes of its own
        if earlier is not None:
            gates, encoders = gates.joined(earlier), encoders.wrapped
        clone = clip.clone()
        clone.cond_stage_model = GatedTextEncoders(encoders, gates)
        return (clone,)


# The folder's name is in both, so that two exports side by side are two nodes.
NODE_CLASS_MAPPINGS = {f"SRS-ME erase concepts {_FOLDER.name}": EraseConcepts}
NODE_DISPLAY_NAME_MAPPINGS = dict.fromkeys(NODE_CLASS_MAPPINGS, f"SRS-ME erase concepts ({_FOLDER.name})")
