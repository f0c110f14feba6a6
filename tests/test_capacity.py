import pytest
import torch

from ldm.diffusion.text_layers import text_layers
from ldm.erasure.capacity import measure_capacity
from ldm.config.concepts import get_concept, watermark_prompts
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.leakage import leakage
from ldm.erasure.shift import SeparableShift

from conftest import is_error

GIVEN = {"templates": 1, "max_base": None, "ridge": 0.1, "keep": 2.0, "spare": 0.5}


def test_capacity_counts_room_and_the_leak_that_shifts_have(tiny):
    concepts = [get_concept("style", index) for index in (0, 1, 2)]
    found = measure_capacity(tiny, concepts, 0, 1.0, [1e-7, 1e-2], GIVEN)
    prompts = ["", *watermark_prompts(), *(concept.prompt for concept in concepts)]
    rows = tiny.encode_prompt(prompts).flatten(0, 1).double()
    assert torch.allclose(found.values, torch.nn.functional.pad(torch.linalg.svdvals(rows) / torch.linalg.matrix_norm(rows, ord=2),
                                                                (0, max(0, tiny.width - len(rows))))[:tiny.width], atol=1e-7)
    exact, coarse = found.table.itertuples()
    assert exact.rank + exact.room == tiny.width == coarse.rank + coarse.room and exact.rank > coarse.rank
    assert exact.more == int(exact.room / exact.directions) < coarse.more and exact.least_reach < coarse.least_reach
    assert exact.leak_protected < 1e-6 < coarse.leak_protected

    layers, seen = text_layers(tiny.unet), tiny.seen(prompts)
    tensors = []
    for concept in concepts:
        protected = [prompt for prompt in prompts if prompt != concept.prompt]
        basis = NullSpaceBasis.solve(tiny.encode_prompt(protected), protected, 1e-2, "svd", {})
        own = tiny.encode_prompt([concept.prompt, concept.captions[0]])
        spared = 0.5 * 2 * tiny.vocab_gram_without(concept.name, *concept.aliases)
        directions, cost = basis.directions(own, None, 0.1, 2.0, spared)
        tensors.append(SeparableShift.closed_form(layers, directions, 1.0, own, tiny.encode_uncond(), cost))
    # Cezanne's prompt is moved by the two others' shifts together: the sum of what each adds.
    moved = sum((seen["Cezanne"].double() @ sum(shift.delta(f"{name}.weight") for shift in tensors[1:]).T).square().sum()
                for name in layers).sqrt()
    base = sum((seen["Cezanne"].double() @ layer.weight.double().T).square().sum() for layer in layers.values()).sqrt()
    told = found.leaks.set_index(["tolerance", "prompt"]).leak
    assert told[1e-2, "Cezanne"] == pytest.approx(float(moved / base), rel=1e-3)
    assert leakage(layers, {"": tensors[1]}, {"Cezanne": seen["Cezanne"]})[0]["leak"] > 0


def test_the_script_ends_with_tables_and_a_plot(script, tiny_path, tmp_path):
    given = ["train-scripts/capacity.py", "--model", tiny_path, "--device", "cpu", "--save_path", tmp_path / "c"]
    code, out, _ = script(*given, "--erased_index", "0-2", "--tolerances", "1e-3,1e-7")
    assert code == 0 and "| 1e-07 |" in out and "a landscape by VanGogh" in out and "leak at 0.001" in out
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"capacity.csv", "capacity.png", "leaks.csv"}
    is_error(script(*given, "--erased_index", "0-2", "--tolerances", "2"), "between 0 and 1")
    is_error(script(*given, "--erased_index", "0-2", "--tolerances", "x"), "--tolerances x")
