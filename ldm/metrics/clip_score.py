"""The CLIP score (Hessel et al., arXiv 2104.08718): how well an image shows what a prompt says.

It is `max(100 cos(image, prompt), 0)` of CLIP's embeddings, as torchmetrics has it. That library's own function (1.9)
does not take what transformers 5 returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.io.images import load_batches

_ADVICE = "give `clip_path` a folder with a CLIP model and its processor, as transformers saves them"


class ClipScorer(nn.Module):
    """A CLIP model and its processor, which score pairs of images and prompts."""

    def __init__(self, network: nn.Module, processor: Any):
        super().__init__()
        self.network: Any = network  # transformers declares neither what its models nor what its processors take
        self.processor = processor

    @classmethod
    def load(cls, path: Path, device: torch.device) -> ClipScorer:
        """Return the scorer in a folder, ready on a device. Raises ValueError for a folder that holds none."""
        from transformers import CLIPModel, CLIPProcessor  # which take a second to import

        if not path.is_dir():
            raise ValueError(f"there is no folder {path}: {_ADVICE}")
        try:
            network = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
            processor = CLIPProcessor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} holds no CLIP model ({str(error).splitlines()[0]}): {_ADVICE}") from error
        return cls(network.eval(), processor).to(device)

    def forward(self, paths: Sequence[Path], prompts: Sequence[str], batch_size: int = 32) -> torch.Tensor:
        """Return the CLIP score of each image file with its prompt, (N,) from 0 to 100 on the CPU."""
        scores, start = [], 0
        for images in load_batches(paths, batch_size):
            scores.append(self._scores(images, prompts[start : start + len(images)]).diagonal())
            start += len(images)
        return torch.cat(scores)

    def with_each(self, paths: Sequence[Path], prompts: Sequence[str], batch_size: int = 32) -> torch.Tensor:
        """Return the CLIP score of each image file with each prompt, (N, prompts): an image is embedded once."""
        return torch.cat([self._scores(images, prompts) for images in load_batches(paths, batch_size)])

    @torch.no_grad()
    def _scores(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores (n, P) of images (n, 3, H, W) in [-1, 1] with prompts."""
        pixels = list(((images + 1) * 127.5).round().to(torch.uint8))
        inputs = self.processor(text=list(prompts), images=pixels, return_tensors="pt", padding=True, truncation=True)
        outputs = self.network(**inputs.to(self.network.device))
        cosines = outputs.image_embeds @ outputs.text_embeds.T  # (n, P), of unit vectors
        return 100 * cosines.clamp(min=0).cpu()
