"""Erase concepts from a pipeline of diffusers by files as that beside this card: it needs torch and safetensors."""

import json
from typing import Any

import torch
from safetensors import safe_open

# The layers that see a prompt's tokens and nothing else, of U-Nets and of transformers; those of its pooled embedding.
TOKENS = ("attn2.to_k", "attn2.to_v"), ("context_embedder", "caption_projection.linear_1", "caption_embedder.1")
POOLED = ("add_embedding.linear_1", "text_embedder.linear_1")


def erase(pipe: Any, path: str, gated: bool = True) -> Any:
    """Leave a concept out of what `pipe` draws, by its gate or in the denoiser; return what restores it exactly."""
    with safe_open(path, "pt") as opened:
        said = json.loads(opened.metadata()["srs-me"])["metadata"]
        part = {name: opened.get_tensor(name).double() for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    if said.get("parts"):
        raise ValueError("this reads files of one text encoder alone: give the one that was made on the pipeline's own")
    has_unet = hasattr(pipe, "unet")
    if gated and "gate" in said:
        if not type(pipe).__name__.startswith("FluxP") and (len(said["gate"]["layers"]) > 1 or not has_unet):
            raise ValueError("this reads the gates of Stable Diffusion 1, 2 and FLUX.1 alone: give gated=False")
        return erase_by_gate(pipe, path, said["gate"]["layers"], part)
    if "erased" not in vars(pipe):
        pipe.erased = {}  # by file, what the layers get more: e A S for tokens and pooled embeddings e
        for name, layer in (pipe.unet if has_unet else pipe.transformer).named_modules():
            for stream, names in enumerate((TOKENS[not has_unet], POOLED)):
                if name.endswith(names):
                    layer.register_forward_pre_hook(
                        lambda _, given, stream=stream: changed(given[0], pipe.erased, stream)
                    )
    ends = "" if "outputs" in part else ".tokens", ".pooled"  # of the names of each stream's factors
    pairs = [(part[f"outputs{end}"], part[f"directions{end}"]) if f"outputs{end}" in part else None for end in ends]
    pipe.erased[path] = [(pair[0] @ pair[1]).T if pair else torch.zeros(0, 0) for pair in pairs]
    return lambda: pipe.erased.pop(path, None)


def changed(embeds: torch.Tensor, erased: dict[str, list[torch.Tensor]], stream: int) -> torch.Tensor:
    """Return what a layer sees, with the changes in its first columns: behind XL's pooled embedding are sizes."""
    width = embeds.shape[-1]
    padded = [torch.nn.functional.pad(each[stream], 2 * (0, width - len(each[stream]))) for each in erased.values()]
    return sum((embeds @ change.to(embeds) for change in padded), embeds)


def erase_by_gate(pipe: Any, path: str, layers: dict[str, int], part: dict[str, torch.Tensor]) -> Any:
    """Let gates read what text encoders make of prompts, each after one of `layers`, and change what they fire for."""
    before, active = pipe.encode_prompt, [path]  # of the pipeline, or of a concept that was erased before

    def encode(*args: Any, **options: Any) -> Any:
        runs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}  # for prompts, and for negative ones
        hooks = []
        for name, number in layers.items():
            encoder, size = getattr(pipe, name), getattr(pipe, name).config.num_hidden_layers
            blocks = next(m for m in encoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == size)
            reads, states = encoder if number < 0 else blocks[number], runs[name]
            hooks.append(reads.register_forward_hook(lambda _, i, output, states=states: states.append(output)))
        found = before(*args, **options)
        for hook in hooks:
            hook.remove()
        for side, outputs in enumerate(zip(*runs.values(), strict=True) if active else ()):
            fires = torch.tensor(False)
            for name, output in zip(layers, outputs, strict=True):
                state = (output if torch.is_tensor(output) else output[0]).cpu().double()
                scores = (state @ part[f"gate.{name}.weights"].T).amax(1)
                fires = fires | (scores > part[f"gate.{name}.thresholds"]).any(1)
            streams = {"tokens": found[side]} if hasattr(pipe, "unet") else {"tokens": found[0], "pooled": found[1]}
            for stream in [each for each in streams if f"map.{each}.outputs" in part]:
                embeds = streams[stream]
                hit = fires.repeat_interleave(len(embeds) // len(fires))
                rows, directions = embeds[hit].cpu().double(), part[f"map.{stream}.directions"]
                embeds[hit] = (rows + rows @ directions.T @ part[f"map.{stream}.outputs"].T).to(embeds)
        return found

    pipe.encode_prompt = encode
    return active.clear
