"""Erase concepts from a pipeline of diffusers by files as that beside this card: it needs torch and safetensors."""

import json
from typing import Any

import torch
from safetensors import safe_open


def erase(pipe: Any, path: str, gated: bool = True) -> Any:
    """Leave a concept out of what `pipe` draws, by its gate or in the denoiser; return what restores it exactly."""
    with safe_open(path, "pt") as opened:
        said = json.loads(opened.metadata()["srs-me"])["metadata"]
        part = {name: opened.get_tensor(name).double() for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    if not gated or "gate" not in said:
        for name, layer in () if "erased" in vars(pipe) else pipe.unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):  # which get e + the sum of A S e, as if it were in weights
                layer.register_forward_pre_hook(lambda _, e: sum((e[0] @ c.to(e[0]) for c in pipe.erased.values()), *e))
        vars(pipe).setdefault("erased", {})[path] = (part["outputs"] @ part["directions"]).T
        return lambda: pipe.erased.pop(path, None)
    (number,), size = said["gate"]["layers"].values(), pipe.text_encoder.config.num_hidden_layers  # one, so not XL's
    blocks = next(m for m in pipe.text_encoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == size)
    before, active = pipe.encode_prompt, [path]  # of the pipeline, or of a concept that was erased before

    def encode(*args: Any, **options: Any) -> Any:
        outputs = []  # of the layer that the gate reads: for prompts, and for negative ones
        hook = blocks[number].register_forward_hook(lambda _, i, output: outputs.append(output))
        found = before(*args, **options)
        hook.remove()
        for embeds, output in zip([each for each in found if each is not None and active], outputs, strict=False):
            state = embeds if number < 0 else output[0] if isinstance(output, tuple) else output
            scores = (state.cpu().double() @ part["gate.text_encoder.weights"].T).amax(1)
            fires = (scores > part["gate.text_encoder.thresholds"]).any(1).repeat_interleave(len(embeds) // len(state))
            hit = embeds[fires].cpu().double()
            embeds[fires] = (hit + hit @ part["map.tokens.directions"].T @ part["map.tokens.outputs"].T).to(embeds)
        return found

    pipe.encode_prompt = encode
    return active.clear
