"""Gated edits: whom they change, what a file keeps of them, and what of a file is believed."""

from dataclasses import replace

import pytest
import torch
from conftest import CPU, make_xl, save_unchecked

from ldm.diffusion.load import load_model
from ldm.diffusion.text_layers import text_layers
from ldm.erasure import gated_edit
from ldm.erasure.embedding_map import EmbeddingMap, fit_map, join_maps
from ldm.erasure.gate import Gate
from ldm.erasure.gated_edit import JOINED_SCALE, LAST_STATE, GatedEdit, GatedPrompts, is_gated_tensor
from ldm.erasure.merge import by_form, describe_forms, edited, shifts_metadata
from ldm.erasure.shift import SHIFT_FILE_TYPE, DenseShift, SeparableShift, WeightShift
from ldm.io.tensors import load_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*has no digest of its contents")  # as of what is changed here

WIDTH, TOKENS, DIM = 16, 4, 8  # of a text encoder's state, of a prompt, of its embedding
PLACES = {"tokens": (slice(0, TOKENS), slice(0, DIM)), "pooled": (slice(TOKENS, TOKENS + 1), slice(0, DIM))}
ENCODER = "text_encoder"
PROMPTS = ["", "a painting by VanGogh", "a photo of a church", "VanGogh", "Picasso"]


def random_rows(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def axis_gate(axis: int, width: int = WIDTH, threshold: float = 6.0) -> Gate:
    """Return a gate that fires on rows that are large along an axis."""
    weights = torch.zeros(1, width)
    weights[0, axis] = 1
    return Gate(weights, torch.tensor([threshold]), 0.5)


def random_map(dim: int, seed: int, rank: int = 3) -> EmbeddingMap:
    return fit_map(random_rows(20, dim, seed=seed), random_rows(20, dim, seed=seed + 50), 0.01, rank)


def axis_edit(axis: int, layer: int = 0, pooled: bool = False) -> GatedEdit:
    maps = {"tokens": random_map(DIM, axis)} | ({"pooled": random_map(DIM, axis + 20)} if pooled else {})
    return GatedEdit({ENCODER: axis_gate(axis)}, {ENCODER: layer}, maps, {"gap": 0.5, "misses": [0, 9, 0.0, 0.3]})


def states_of(*axes: tuple[int, ...], layer: int = 0) -> dict[tuple[str, int], torch.Tensor]:
    """Return the states of prompts whose row 1 is large along some axes."""
    states = random_rows(len(axes), TOKENS, WIDTH, seed=7).clamp(-2, 2)
    for number, large in enumerate(axes):
        for axis in large:
            states[number, 1, axis] = 10
    return {(ENCODER, layer): states}


def test_prompts_that_trip_nothing_keep_every_bit():
    prompts = GatedPrompts({"0": axis_edit(0), "1": axis_edit(1)})
    embeds = random_rows(4, TOKENS, DIM, seed=1)
    assert prompts(embeds, states_of((), (), (5,), ())) is embeds
    before = embeds.clone()
    result = prompts(embeds, states_of((), (0,), (5,), (1,)))
    assert torch.equal(embeds, before)  # what it is given stays
    assert torch.equal(result[[0, 2]], embeds[[0, 2]])
    assert not torch.equal(result[1], embeds[1]) and not torch.equal(result[3], embeds[3])


def test_each_prompt_becomes_what_its_map_makes_of_it():
    edits = {"0": axis_edit(0), "1": axis_edit(1)}
    prompts, embeds = GatedPrompts(edits), random_rows(3, TOKENS, DIM, seed=1)
    result = prompts(embeds, states_of((1,), (0,), (0, 1)))
    assert torch.equal(result[0], edits["1"].maps["tokens"](embeds[0]))
    assert torch.equal(result[1], edits["0"].maps["tokens"](embeds[1]))
    joined = join_maps([edit.maps["tokens"] for edit in edits.values()])
    change = JOINED_SCALE * (joined(embeds[2]) - embeds[2])  # which goes further than each concept's own
    assert torch.allclose(result[2], embeds[2] + change, atol=1e-5)


def test_neither_batch_nor_order_changes_what_becomes_of_a_prompt():
    edits = {"0": axis_edit(0), "1": axis_edit(1), "2": axis_edit(2)}
    axes = [(), (0,), (1, 2), (3,), (0, 1, 2), (2,)]
    embeds, states = random_rows(len(axes), TOKENS, DIM, seed=1), states_of(*axes)
    prompts = GatedPrompts(edits)
    labels, result = prompts.fired(states), prompts(embeds, states)
    assert labels == [tuple(str(axis) for axis in large if axis < 3) for large in axes]
    order = [4, 2, 0, 5, 1, 3]
    reordered = {key: state[order] for key, state in states.items()}
    assert prompts.fired(reordered) == [labels[number] for number in order]
    assert torch.equal(prompts(embeds[order], reordered), result[order])
    for number in range(len(axes)):
        single = {key: state[number : number + 1] for key, state in states.items()}
        assert torch.equal(prompts(embeds[number : number + 1], single)[0], result[number])
    backwards = GatedPrompts(dict(reversed(edits.items())))
    assert torch.allclose(backwards(embeds, states), result, atol=1e-6)


def test_an_erased_concept_that_a_prompt_does_not_say_does_not_matter_to_it():
    embeds, states = random_rows(2, TOKENS, DIM, seed=1), states_of((0,), ())
    alone, together = GatedPrompts({"0": axis_edit(0)}), GatedPrompts({"0": axis_edit(0), "1": axis_edit(1)})
    assert torch.equal(alone(embeds, states), together(embeds, states))


def test_only_the_maps_of_edits_that_fire_are_joined(monkeypatch):
    joined: list[int] = []

    def count(maps):
        joined.append(len(maps))
        return join_maps(maps)

    monkeypatch.setattr(gated_edit, "join_maps", count)
    prompts = GatedPrompts({str(axis): axis_edit(axis) for axis in range(WIDTH)})
    embeds = random_rows(3, TOKENS, DIM, seed=1)
    prompts(embeds, states_of((), (), ()))
    assert joined == []
    prompts(embeds, states_of((), (3,), (5, 9)))
    assert joined == [1, 2]


def test_gates_of_several_encoders_and_layers_are_all_read_and_any_fires():
    gates = {ENCODER: axis_gate(0), "text_encoder_2": axis_gate(1)}
    maps = {"tokens": random_map(DIM, 0), "pooled": random_map(DIM, 1)}
    edit = GatedEdit(gates, {ENCODER: 0, "text_encoder_2": 2}, maps)
    other = GatedEdit({ENCODER: axis_gate(2)}, {ENCODER: LAST_STATE}, maps)
    prompts = GatedPrompts({"a": edit, "b": other})
    assert prompts.layers == {ENCODER: {0, LAST_STATE}, "text_encoder_2": {2}}
    states = {
        **states_of((0,), (), ()),
        ("text_encoder_2", 2): states_of((), (1,), ())[ENCODER, 0],
        **states_of((), (2,), (), layer=LAST_STATE),
    }
    assert prompts.fired(states) == [("a",), ("a", "b"), ()]


def test_the_pooled_row_has_a_map_of_its_own():
    edit, embeds = axis_edit(0, pooled=True), random_rows(2, TOKENS + 1, DIM, seed=1)
    result = GatedPrompts({"0": edit}, PLACES)(embeds, states_of((0,), ()))
    assert torch.equal(result[0, :-1], edit.maps["tokens"](embeds[0, :-1]))
    assert torch.equal(result[0, -1:], edit.maps["pooled"](embeds[0, -1:])) and torch.equal(result[1], embeds[1])


def test_a_place_is_its_columns_and_a_row_of_zeros_is_none():
    edit, embeds = axis_edit(0), random_rows(1, TOKENS, 2 * DIM, seed=1)
    embeds[0, 2] = 0
    places = {"tokens": (slice(0, TOKENS), slice(DIM, 2 * DIM))}
    result = GatedPrompts({"0": edit}, places)(embeds, states_of((0,)))
    assert torch.equal(result[..., :DIM], embeds[..., :DIM]) and not result[0, 2].any()
    assert torch.equal(result[0, :2, DIM:], edit.maps["tokens"](embeds[0, :2, DIM:]))


# A shift with a gate in a file


def gated_shift(edit: GatedEdit | None) -> SeparableShift:
    coefficients = {"layer": random_rows(6, 2, seed=0)}
    shift = SeparableShift(coefficients, random_rows(2, DIM, seed=1).double(), 0.5)
    shift.gated = edit
    return shift


def edit_of(shift: WeightShift) -> GatedEdit:
    assert shift.gated is not None
    return shift.gated


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "s.safetensors"
    gated_shift(axis_edit(0, layer=2, pooled=True)).save(path, {"concept": "VanGogh"})
    return path


OLD_GATE = Gate(random_rows(1, 3, WIDTH, seed=2)[0].half().float(), torch.tensor([0.1, 0.2, 0.3]))


def test_a_gate_of_an_older_file_stays_in_half_precision():
    edit = axis_edit(0, layer=2)
    old = replace(edit, gates={ENCODER: OLD_GATE})
    tensors = old.tensors()
    assert tensors[f"gate.{ENCODER}.weights"].dtype == torch.float16 and f"gate.{ENCODER}.scales" not in tensors
    loaded = GatedEdit.read(tensors, old.metadata)
    assert loaded is not None and torch.equal(loaded.gates[ENCODER].weights, OLD_GATE.weights)
    assert torch.equal(loaded.gates[ENCODER].thresholds, old.gates[ENCODER].thresholds)
    assert edit.tensors()[f"gate.{ENCODER}.weights"].dtype == torch.int8


def test_a_file_keeps_the_gate_and_its_decisions(path):
    edit, loaded = axis_edit(0, layer=2, pooled=True), WeightShift.load(path)
    assert loaded.gated is not None and loaded.metadata["gate"] == loaded.gated.metadata == edit.metadata
    assert torch.equal(loaded.gated.gates[ENCODER].weights, edit.gates[ENCODER].weights)
    assert loaded.gated.layers == edit.layers and loaded.gated.gates[ENCODER].gap == 0.5
    embeds, states = random_rows(3, TOKENS + 1, DIM, seed=1), states_of((0,), (), (1,), layer=2)
    assert torch.equal(loaded.gated.margins(states), edit.margins(states))
    expected, found = (GatedPrompts({"0": each}, PLACES)(embeds, states) for each in (edit, loaded.gated))
    assert torch.allclose(found, expected, atol=1e-5) and torch.equal(found[1:], embeds[1:])
    assert torch.equal(loaded.delta_weight("layer.weight"), gated_shift(None).delta_weight("layer.weight"))


def test_a_gate_is_written_twice_with_the_same_bytes(path, tmp_path):
    loaded = WeightShift.load(path)
    loaded.save(tmp_path / "again.safetensors", {"concept": "VanGogh"})
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_joined_maps_survive_the_file(path, tmp_path):
    gated_shift(axis_edit(1, layer=2, pooled=True)).save(tmp_path / "t.safetensors", {})
    edits = {"0": axis_edit(0, layer=2, pooled=True), "1": axis_edit(1, layer=2, pooled=True)}
    files = {"0": path, "1": tmp_path / "t.safetensors"}
    loaded = {label: edit_of(WeightShift.load(file)) for label, file in files.items()}
    embeds, states = random_rows(1, TOKENS + 1, DIM, seed=1), states_of((0, 1), layer=2)
    one, other = (GatedPrompts(each, PLACES)(embeds, states) for each in (loaded, edits))
    assert torch.allclose(one, other, atol=1e-4)


def test_a_shift_without_a_gate_has_none_of_its_tensors_and_loads_as_before(tmp_path):
    gated_shift(None).save(tmp_path / "s.safetensors", {})
    loaded = WeightShift.load(tmp_path / "s.safetensors")
    assert loaded.gated is None and "gate" not in loaded.metadata
    assert not any(map(is_gated_tensor, load_tensors(tmp_path / "s.safetensors", SHIFT_FILE_TYPE)[0]))


def test_a_dense_shift_may_have_a_gate_too_and_a_cut_one_keeps_its_own(path, tmp_path):
    dense = DenseShift({"conv.weight": random_rows(2, 2, seed=0)})
    dense.gated = axis_edit(0)
    dense.save(tmp_path / "d.safetensors", {})
    loaded = WeightShift.load(tmp_path / "d.safetensors")
    assert isinstance(loaded, DenseShift) and loaded.gated is not None and loaded.parameter_names == ["conv.weight"]
    shift = WeightShift.load(path)
    assert isinstance(shift, SeparableShift) and shift.truncate(1).gated is shift.gated


def change_file(path, tensors=None, **gate) -> None:
    """Write a shift's file anew with other tensors (None: without it) and other metadata of its gate."""
    stored, metadata = load_tensors(path, SHIFT_FILE_TYPE)
    contents = dict(stored) | (tensors or {})
    metadata["gate"] = {**metadata["gate"], **gate}
    kept = {name: tensor for name, tensor in contents.items() if tensor is not None}
    save_unchecked(path, kept, SHIFT_FILE_TYPE, metadata)


GATED_TENSORS = [
    *(f"gate.{ENCODER}.{part}" for part in ("weights", "thresholds", "scales")),
    *(f"map.{stream}.{part}" for stream in ("tokens", "pooled") for part in ("outputs", "directions", "gram")),
]


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("name", GATED_TENSORS)
def test_a_tensor_of_the_gate_that_is_missing_or_wrong_is_refused(path, name, is_old):
    if is_old and name.endswith("scales"):
        return
    if is_old:
        edit = replace(axis_edit(0, layer=2, pooled=True), gates={ENCODER: OLD_GATE})
        gated_shift(edit).save(path, {"concept": "VanGogh"})
    content, tensor = path.read_bytes(), load_tensors(path, SHIFT_FILE_TYPE)[0][name]
    wrong = {
        "missing": None,
        "longer": torch.cat([tensor, tensor]),
        "empty": tensor[:0],
        "flat": tensor.flatten()[None, None],
        "a number": tensor.flatten()[0].clone(),
        "NaN": torch.full_like(tensor.float(), torch.nan),
        "infinite": torch.full_like(tensor.float(), torch.inf),
        "huge": torch.full_like(tensor.float(), 1e30),
        "whole numbers": tensor.long(),
    }
    if tensor.dim() == 2:
        wrong["no columns"] = tensor[:, :0]
    if name.endswith("scales"):
        wrong |= {str(value): torch.full_like(tensor, value) for value in (0, -1, 0.3)}
    for kind, other in wrong.items():
        path.write_bytes(content)
        change_file(path, {name: other})
        with pytest.raises(ValueError, match=r"s\.safetensors") as caught:
            WeightShift.load(path)
        assert "make" in str(caught.value), kind


def test_tensors_that_no_gate_has_are_refused(path):
    for name in ("gate.text_encoder.other", "map.tokens", "gate.", "map.other.gram"):
        content = path.read_bytes()
        change_file(path, {name: torch.zeros(2, 2)})
        with pytest.raises(ValueError, match="wrong names, shapes or sizes"):
            WeightShift.load(path)
        path.write_bytes(content)


PENALTIES = {"tokens": 0.1, "pooled": 0.1}


@pytest.mark.parametrize(
    "gate",
    [
        {"penalties": None},
        {"penalties": {}},
        {"penalties": [0.1, 0.1]},
        {"penalties": {"tokens": 0.1}},
        {"penalties": {"pooled": 0.1}},
        {"penalties": {"tokens": 0.1, "other": 0.1}},
        *(
            {"penalties": PENALTIES | {"tokens": wrong}}
            for wrong in (0, -1, "0.1", None, True, 1e30, [1], float("nan"))
        ),
        {"layers": None},
        {"layers": {}},
        {"layers": [0]},
        {"layers": {"text_encoder_2": 0}},
        {"layers": {ENCODER: 0, "text_encoder_2": 0}},
        *({"layers": {ENCODER: wrong}} for wrong in (-2, 0.0, "0", None, True, [0])),
    ],
)
def test_what_the_header_says_of_the_gate_is_checked(path, gate):
    change_file(path, **gate)
    with pytest.raises(ValueError, match=r"s\.safetensors"):
        WeightShift.load(path)


@pytest.mark.parametrize("gate", [None, [], "gate", 3])
def test_a_header_without_a_gate_for_tensors_of_one_is_refused(path, gate):
    lazy, metadata = load_tensors(path, SHIFT_FILE_TYPE)
    stored = dict(lazy)
    save_unchecked(path, stored, SHIFT_FILE_TYPE, {**metadata, "gate": gate})
    with pytest.raises(ValueError, match=r"s\.safetensors"):
        WeightShift.load(path)
    del metadata["gate"]
    save_unchecked(path, stored, SHIFT_FILE_TYPE, metadata)
    with pytest.raises(ValueError, match=r"s\.safetensors"):
        WeightShift.load(path)


@pytest.mark.parametrize("gap", [None, "wide", float("nan"), [0.1]])
def test_a_gap_that_is_no_number_is_none(path, gap):
    change_file(path, gap=gap)
    gated = WeightShift.load(path).gated
    assert gated is not None and gated.gates[ENCODER].gap == 0


def test_a_gram_that_no_rows_have_is_refused(path):
    """Maps are joined by solving equations with it, which have no solution where it is not positive definite."""
    content = path.read_bytes()
    skew = torch.eye(3)
    skew[0, 1] = 0.5
    for gram in (torch.zeros(3, 3), -torch.eye(3), skew):
        path.write_bytes(content)
        change_file(path, {"map.tokens.gram": gram})
        with pytest.raises(ValueError, match="wrong names, shapes or sizes"):
            WeightShift.load(path)


def test_a_map_of_hardly_any_ridge_is_read_again(tmp_path):
    """Files have float32, whose rounding of large moments is more than the ridge."""
    rows = random_rows(50, DIM, seed=0) * torch.logspace(2, -4, DIM)
    shift = gated_shift(GatedEdit({ENCODER: axis_gate(0)}, {ENCODER: 0}, {"tokens": fit_map(rows, -rows, 1e-9, DIM)}))
    shift.save(tmp_path / "s.safetensors", {})
    assert WeightShift.load(tmp_path / "s.safetensors").gated is not None


# Models without concepts


def shift_for(model, prompt: str, seed: int = 0) -> SeparableShift:
    """Return a shift of random coefficients whose gate fires on prompts that have the last row of a prompt's name."""
    states = model.encode_with_states([*PROMPTS], {ENCODER: [0]})[1][ENCODER, 0]
    own = model.encode_with_states([prompt], {ENCODER: [0]})[1][ENCODER, 0][0, 1]
    weight = torch.linalg.lstsq(torch.cat([states[0], own[None]]), torch.eye(len(states[0]) + 1)[-1]).solution
    gate = Gate(weight[None].half().float(), torch.tensor([0.7]), 0.1)
    maps = {stream: random_map(width, seed + number) for number, (stream, width) in enumerate(model.widths.items())}
    coefficients = {}
    for name, layer in text_layers(model.denoiser).items():
        coefficients[name] = random_rows(layer.out_features, 2, seed=seed)
    shift = SeparableShift(coefficients, random_rows(2, model.context_dim, seed=seed).double(), 0.5)
    shift.gated = GatedEdit({ENCODER: gate}, {ENCODER: 0}, maps)
    return shift


def test_a_gated_shift_changes_what_says_its_concept_and_no_weight(tiny):
    shift = shift_for(tiny, "VanGogh")
    plain, weights = (
        tiny.encode_prompt(PROMPTS),
        {name: value.clone() for name, value in tiny.denoiser.named_parameters()},
    )
    with edited(tiny, {"1": shift}, "gated"):
        result = tiny.encode_prompt(PROMPTS)
        assert all(torch.equal(value, weights[name]) for name, value in tiny.denoiser.named_parameters())
    changed = [prompt for prompt, a, b in zip(PROMPTS, result, plain, strict=True) if not torch.equal(a, b)]
    assert "VanGogh" in changed and "" not in changed
    kept = [number for number, prompt in enumerate(PROMPTS) if prompt not in changed]
    assert torch.equal(result[kept], plain[kept])
    assert torch.equal(result[3], edit_of(shift).maps["tokens"](plain[3]))
    assert torch.equal(tiny.encode_prompt(PROMPTS), plain) and tiny.embedding_edit is None


def test_the_linear_form_changes_weights_and_no_embedding(tiny):
    shift = shift_for(tiny, "VanGogh")
    name, plain = shift.parameter_names[0], tiny.encode_prompt(PROMPTS)
    base = tiny.denoiser.get_parameter(name)
    with pytest.raises(RuntimeError), edited(tiny, {"1": shift}, "linear"):
        assert torch.equal(tiny.encode_prompt(PROMPTS), plain) and tiny.embedding_edit is None
        assert not torch.equal(tiny.denoiser.get_parameter(name), base)
        raise RuntimeError
    assert tiny.denoiser.get_parameter(name) is base
    with pytest.raises(RuntimeError), edited(tiny, {"1": shift}, "gated"):
        raise RuntimeError
    assert tiny.embedding_edit is None


def test_shifts_with_and_without_a_gate_act_together(tiny):
    gated, plain = shift_for(tiny, "VanGogh"), shift_for(tiny, "Picasso", seed=5)
    plain.gated = None
    shifts = {"1": gated, "2": plain}
    assert by_form(shifts, "gated") == ({"1": gated}, {"2": plain}) and by_form(shifts, "linear") == ({}, shifts)
    name = plain.parameter_names[0]
    expected = (tiny.denoiser.get_parameter(name).double() + plain.delta_weight(name)).float()
    with edited(tiny, shifts, "gated"):
        assert torch.equal(tiny.denoiser.get_parameter(name), expected) and tiny.embedding_edit is not None
    assert describe_forms(shifts, "gated") == "gated: 1; linear (without a gate): 2"
    assert describe_forms(shifts, "linear") == "linear: 1, 2" and describe_forms({}, "gated") == "no shift"
    assert shifts_metadata(shifts, "gated") == {"shifts": {"1": {}, "2": {}}, "gated": ["1"]}
    assert shifts_metadata(shifts, "linear") == {"shifts": {"1": {}, "2": {}}}


def unfitting(model) -> dict[str, GatedEdit]:
    edit = edit_of(shift_for(model, "VanGogh"))
    narrow = {"tokens": random_map(model.context_dim - 1, 0)}
    return {
        "width": GatedEdit({ENCODER: axis_gate(0)}, {ENCODER: 0}, edit.maps),
        "encoder": GatedEdit({"text_encoder_2": edit.gates[ENCODER]}, {"text_encoder_2": 0}, edit.maps),
        "layer": GatedEdit(edit.gates, {ENCODER: 99}, edit.maps),
        "context": GatedEdit(edit.gates, edit.layers, narrow),
        "pooled": GatedEdit(edit.gates, edit.layers, {**edit.maps, "pooled": edit.maps["tokens"]}),
    }


@pytest.mark.parametrize("kind", ["width", "encoder", "layer", "context", "pooled"])
def test_a_gate_of_another_model_is_refused_before_anything_is_changed(tiny, kind):
    shift = shift_for(tiny, "VanGogh")
    wrong = unfitting(tiny)
    shift.gated, shift.path = wrong[kind], "x.safetensors"
    name = shift.parameter_names[0]
    base = tiny.denoiser.get_parameter(name)
    with (
        pytest.raises(ValueError, match=r"x\.safetensors: its gate does not fit the model's text encoder"),
        edited(tiny, {"1": shift}, "gated"),
    ):
        pytest.fail("it is entered")
    assert tiny.embedding_edit is None and tiny.denoiser.get_parameter(name) is base


def test_a_gate_acts_on_a_model_of_two_encoders(tmp_path):
    model = load_model(make_xl(tmp_path / "xl"), CPU)
    shift = shift_for(model, "VanGogh")
    plain = model.encode_prompt(PROMPTS)
    with edited(model, {"1": shift}, "gated"):
        result = model.encode_prompt(PROMPTS)
    assert torch.equal(result[0], plain[0])
    before, after = model.split(plain), model.split(result)
    assert torch.equal(after.tokens[3], edit_of(shift).maps["tokens"](before.tokens[3]))
    assert torch.equal(after.pooled[3], edit_of(shift).maps["pooled"](before.pooled[3]))
    shift.gated = GatedEdit(edit_of(shift).gates, edit_of(shift).layers, {"tokens": edit_of(shift).maps["tokens"]})
    with edited(model, {"1": shift}, "gated"):  # whose pooled embedding stays
        assert torch.equal(model.split(model.encode_prompt(PROMPTS)).pooled, before.pooled)
