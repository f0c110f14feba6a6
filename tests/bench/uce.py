"""Erase concepts from a Stable Diffusion model by UCE, Unified Concept Editing (arXiv 2308.14761): a baseline.

    python tests/bench/uce.py --model_path models/mini-sd --edit_concepts 'a church' \
        --preserve_concepts 'a dog; oil painting' --save uce.safetensors

Written from the paper's equation 7, with the defaults of its authors' script, and none of its code: the last token of a
concept's name stands for it, the guiding concept is the empty prompt, lambda is 0.5. It uses nothing of this package,
since what is measured beside it is the whole of a command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file


def last_token_embeds(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> torch.Tensor:
    """Return the embedding of the last token of each prompt, (N, d): of the empty prompt that of its beginning."""
    embeds, _ = pipeline.encode_prompt(list(prompts), "cpu", 1, do_classifier_free_guidance=False)  # (N, tokens, d)
    tokenized = pipeline.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    last = tokenized.attention_mask.sum(1) - 2  # before the token that ends a prompt
    return embeds[torch.arange(len(prompts)), last]


def edited_weight(
    weight: torch.Tensor, edited: torch.Tensor, guides: torch.Tensor, preserved: torch.Tensor, lamb: float
) -> torch.Tensor:
    """Return the W* of equation 7, (out, d), for a layer's `weight` W, (out, d).

    `edited` are the embeddings c_i (N, d), whose outputs become v_i = W `guides`_i, and `preserved` are the c_j (M, d):
    W* = (sum_i v_i c_i^T + sum_j W c_j c_j^T + lambda W) (sum_i c_i c_i^T + sum_j c_j c_j^T + lambda I)^-1.
    """
    outputs = guides @ weight.T  # (N, out)
    kept = preserved.T @ preserved + lamb * torch.eye(weight.shape[1])  # (d, d)
    return (outputs.T @ edited + weight @ kept) @ torch.inverse(edited.T @ edited + kept)


def split_names(text: str) -> list[str]:
    """Return the names in a list such as 'a church; a dog'."""
    return [name.strip() for name in text.split(";")]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="a diffusers folder")
    parser.add_argument("--edit_concepts", type=split_names, required=True, help="what to erase, separated by ;")
    parser.add_argument("--guide_concept", default="", help="what it becomes")
    parser.add_argument("--preserve_concepts", type=split_names, required=True, help="what stays, separated by ;")
    parser.add_argument("--lamb", type=float, default=0.5, help="lambda, which holds the weights where they are")
    parser.add_argument("--save", type=Path, required=True, help="the file of the changed weights")
    args = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(args.model_path, dtype=torch.float32, safety_checker=None)
    edited = last_token_embeds(pipeline, args.edit_concepts)
    guides = last_token_embeds(pipeline, [args.guide_concept]).expand_as(edited)
    preserved = last_token_embeds(pipeline, args.preserve_concepts)
    changed: dict[str, torch.Tensor] = {}
    for name, layer in pipeline.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            changed[f"{name}.weight"] = edited_weight(layer.weight, edited, guides, preserved, args.lamb)
    save_file(changed, args.save)
    print(f"{len(changed)} weights without {', '.join(args.edit_concepts)} -> {args.save}")


if __name__ == "__main__":
    main()
