"""Erase a concept from a pipeline of diffusers by the file beside this card: it needs torch and safetensors."""

import json
from typing import Any

import torch
from safetensors import safe_open


def erase(pipe: Any, path: str, gated: bool = True) -> Any:
    """Leave a concept out of what `pipe` draws, by its gate or else by the weights; return what restores it exactly."""
    with safe_open(path, "pt") as opened:
        said = json.loads(opened.metadata()["srs-me"])["metadata"]
        part = {name: opened.get_tensor(name).double() for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    if not gated or "gate" not in said:
        change = part["outputs"] @ part["directions"]
        weights = [m.weight for name, m in pipe.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
        kept = [weight.data for weight in weights]
        for weight in weights:
            weight.data = (weight.data.cpu().double() @ (torch.eye(len(change)) + change)).to(weight.data)
        return lambda: [setattr(weight, "data", data) for weight, data in zip(weights, kept, strict=True)]
    (number,), size = said["gate"]["layers"].values(), pipe.text_encoder.config.num_hidden_layers  # one, so not XL's
    blocks = next(m for m in pipe.text_encoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == size)

    def encode(*args: Any, **options: Any) -> Any:
        outputs = []  # of the layer that the gate reads: for prompts, and for negative ones
        hook = blocks[number].register_forward_hook(lambda _, i, output: outputs.append(output))
        found = type(pipe).encode_prompt(pipe, *args, **options)
        hook.remove()
        for embeds, output in zip([each for each in found if each is not None], outputs, strict=False):
            state = embeds if number < 0 else output[0] if isinstance(output, tuple) else output
            scores = (state.cpu().double() @ part["gate.text_encoder.weights"].T).amax(1)
            fires = (scores > part["gate.text_encoder.thresholds"]).any(1).repeat_interleave(len(embeds) // len(state))
            hit = embeds[fires].cpu().double()
            embeds[fires] = (hit + hit @ part["map.tokens.directions"].T @ part["map.tokens.outputs"].T).to(embeds)
        return found

    pipe.encode_prompt = encode
    return lambda: delattr(pipe, "encode_prompt")
