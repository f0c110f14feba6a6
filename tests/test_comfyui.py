"""Gates in ComfyUI: its node gives the embeddings that this package gives, and touches nothing else.

ComfyUI is imitated in what the node uses of it: `SDClipModel` of its `sd1_clip`, whose layers add in place and which
weighs words in place, the models that hold one or two of these, and `CLIP` of its `sd`.
"""

import ast
import importlib.util
import sys
from copy import deepcopy

import pytest
import torch
from conftest import CPU, ROOT, make_xl
from families import make_family
from safetensors import safe_open
from torch import nn

from ldm.config.methods import ExportConfig
from ldm.diffusion.load import load_model
from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.text_model import join_streams
from ldm.diffusion.text_states import LAST_STATE
from ldm.erasure import comfyui_node, export_comfyui
from ldm.erasure.embedding_map import fit_map
from ldm.erasure.export import export
from ldm.erasure.gate import GateTask, Positives, fit_gates
from ldm.erasure.gated_edit import GatedEdit
from ldm.erasure.merge import edited
from ldm.erasure.negatives import Negatives
from ldm.erasure.prompt_rows import PromptRows
from ldm.erasure.shift import SeparableShift, WeightShift
from ldm.io.files import METADATA_FILE, read_dir_metadata

CONCEPTS = {"1": "VanGogh", "2": "Picasso", "3": "Cezanne"}
PLAIN = ["", "a painting of a church", "Kandinsky", "a photo of a house"]
FIRES = {  # prompts, and the labels of the concepts that they say
    "a painting by VanGogh": ("1",),
    "Picasso": ("2",),
    "VanGogh and Picasso": ("1", "2"),
    "art by Cezanne": ("3",),
}
MERGE = "train-scripts/Merge_model.py"


# What of ComfyUI the node uses


class InPlaceLayer(nn.Module):
    """A layer that returns the tensor it is given, with its outputs in it, as those of ComfyUI do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, rows, *args, **kwargs):
        self.output = self.layer(rows, *args, **kwargs).clone()
        return rows.copy_(self.output)


class SDClipModel(nn.Module):
    def __init__(self, encoder, layer="last", layer_idx=None, has_norm=True):
        super().__init__()
        self.transformer = deepcopy(encoder)
        self.num_layers = encoder.config.num_hidden_layers
        (layers,) = [part for part in self.transformer.modules() if isinstance(part, nn.ModuleList)]
        for number, part in enumerate(layers):
            layers[number] = InPlaceLayer(part)
        self.layers, self.has_norm, self.return_projected_pooled = list(layers), has_norm, True
        self.defaults = self.layer, self.layer_idx = layer, layer_idx

    def set_clip_options(self, options):
        layer_idx = options.get("layer", self.layer_idx)
        self.return_projected_pooled = options.get("projected_pooled", self.return_projected_pooled)
        if layer_idx is None or abs(layer_idx) > self.num_layers:
            self.layer = "last"
        else:
            self.layer, self.layer_idx = "hidden", layer_idx

    def reset_clip_options(self):
        self.layer, self.layer_idx = self.defaults
        self.return_projected_pooled = True

    def forward(self, tokens):
        output = self.transformer(torch.tensor(tokens))
        embeds = output[0] if "text_embeds" not in output else output.last_hidden_state
        if self.layer == "hidden":
            embeds = self.layers[self.layer_idx].output
            norm = next(part for name, part in self.transformer.named_modules() if name.endswith("final_layer_norm"))
            embeds = norm(embeds) if self.has_norm else embeds
        pooled = output.text_embeds if "text_embeds" in output else None
        return embeds.float(), None if pooled is None else pooled.float()

    def encode(self, tokens):
        return self(tokens)

    def encode_token_weights(self, pairs):
        sections = [[token for token, _ in section] for section in pairs]
        has_weights = any(weight != 1.0 for section in pairs for _, weight in section)
        if has_weights:
            sections.append(self.empty_tokens)
        embeds, pooled = self.encode(sections)[:2]
        for number, section in enumerate(pairs):
            for place, (_, weight) in enumerate(section):
                if weight != 1.0:
                    empty = embeds[-1, place]
                    embeds[number, place] = (embeds[number, place] - empty) * weight + empty
        return torch.cat(list(embeds[: len(pairs)]))[None], None if pooled is None else pooled[:1]


class ClipModel(nn.Module):
    def __init__(self, encoders):
        super().__init__()
        for name, encoder in encoders.items():
            setattr(self, name, encoder)

    def set_clip_options(self, options):
        for encoder in self.children():
            encoder.set_clip_options(options)

    def reset_clip_options(self):
        for encoder in self.children():
            encoder.reset_clip_options()

    def encode_token_weights(self, tokens):
        found = [encoder.encode_token_weights(tokens[name[-1]]) for name, encoder in self.named_children()]
        return torch.cat([embeds for embeds, _ in found], dim=-1), found[-1][1]


class Clip:
    layer_idx = None

    def __init__(self, model, tokenizer):
        self.cond_stage_model, self.tokenizer = model, tokenizer

    def clone(self):
        copied = Clip(self.cond_stage_model, self.tokenizer)
        copied.layer_idx = self.layer_idx
        return copied

    def tokenize(self, *sections, weights=()):
        """Return the tokens of prompts, with the weights of those that have one, by place."""
        ids = self.tokenizer(list(sections), padding="max_length", truncation=True).input_ids
        pairs = [[(token, dict(weights).get(place, 1.0)) for place, token in enumerate(found)] for found in ids]
        return {"l": pairs, "g": pairs}

    @torch.inference_mode()
    def encode(self, *sections, weights=(), projected=True):
        model = self.cond_stage_model
        model.reset_clip_options()
        if self.layer_idx is not None:
            model.set_clip_options({"layer": self.layer_idx})
        if not projected:
            model.set_clip_options({"projected_pooled": False})
        return model.encode_token_weights(self.tokenize(*sections, weights=weights))


def clip_of(model) -> Clip:
    """Return a model's text encoders as ComfyUI has them."""
    first, *second = model.text_encoders.values()
    if second:
        options = {"layer": "hidden", "layer_idx": -2, "has_norm": False}
        encoders = {"clip_l": SDClipModel(first, **options), "clip_g": SDClipModel(second[0], **options)}
    else:
        encoders = {"clip_l": SDClipModel(first)}
    for encoder in encoders.values():
        encoder.empty_tokens = model.tokenizers[0]("", padding="max_length", truncation=True).input_ids
    return Clip(ClipModel(encoders).requires_grad_(False).eval(), model.tokenizers[0])


def import_node(folder):
    """Import a folder of custom nodes as ComfyUI does, and return its one node."""
    spec = importlib.util.spec_from_file_location(f"custom_nodes.{folder.name}", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)  # into a folder whose files are counted
        spec.loader.exec_module(module)
    ((name, node),) = module.NODE_CLASS_MAPPINGS.items()
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == {name} and folder.name in name
    assert node.INPUT_TYPES()["required"]["clip"] == ("CLIP",) and node.RETURN_TYPES == ("CLIP",)
    return getattr(node(), node.FUNCTION)


def has_leftovers(clip) -> bool:
    """Return whether hooks, or another `encode`, were left in a CLIP."""
    encoders = list(clip.cond_stage_model.children())
    layers = [layer for encoder in encoders for layer in encoder.layers]
    return any(layer._forward_hooks for layer in layers) or any("encode" in vars(encoder) for encoder in encoders)


# Shifts with gates, and what this package makes of prompts with them


def make_shift(model, label: str, layer: int, folder) -> WeightShift:
    """Return a shift, read from a file, whose gate fires on the prompts that have its concept's name in them."""
    name = CONCEPTS[label]
    own = [name, f"a painting by {name}", f"art by {name}", f"{name} and Picasso", f"VanGogh and {name}"]
    others = [*PLAIN, *CONCEPTS.values(), *FIRES, "a painting by Picasso", "art by VanGogh"]
    others = [prompt for prompt in others if name not in prompt]
    layers = {encoder: [layer] for encoder in model.text_encoders}
    embeds, states = model.encode_with_states(own, layers)
    other_states = model.encode_with_states(others, layers)[1]
    end = model.tokenizers[0].eos_token_id
    last = torch.tensor([model.tokenizers[0](prompt).input_ids.index(end) - 1 for prompt in own])
    gates = {}
    for encoder in model.text_encoders:
        rows, other = (PromptRows.whole(found[encoder, layer]) for found in (states, other_states))
        task = GateTask([Positives(rows, last)], torch.zeros(len(other), dtype=torch.bool), other.select([]))
        [[gates[encoder]]] = fit_gates([task], Negatives(other, 0.01), 0.5)
    neutral = model.encode_prompt(["an artist"])
    said, plain = model.split(embeds), model.split(neutral)
    maps = {"tokens": fit_map(said.tokens.flatten(0, 1), _like(plain.tokens, own), 1e-3, 8)}
    if said.pooled is not None and plain.pooled is not None:
        maps["pooled"] = fit_map(said.pooled, plain.pooled.expand(len(own), -1), 1e-3, 4)
    shift = SeparableShift(
        {layer: torch.ones(part.out_features, 1) for layer, part in text_layers(model.denoiser).items()},
        torch.eye(1, model.context_dim).double(),
        1e-3,
    )
    shift.gated = GatedEdit(gates, dict.fromkeys(model.text_encoders, layer), maps, {"gap": 0.1})
    metadata = {
        "concept": name,
        "prompt": name,
        "captions": own,
        "protected": [""],
        "concept_index": int(label),
        "category": "style",
        "base_digest": model.digest,
    }
    shift.save(folder / f"{label}.safetensors", metadata)
    return WeightShift.load(folder / f"{label}.safetensors")


def _like(rows: torch.Tensor, prompts) -> torch.Tensor:
    return rows.expand(len(prompts), -1, -1).flatten(0, 1)


@pytest.fixture(scope="module", params=["one encoder", "XL"])
def model(request, tmp_path_factory, tiny_path):
    folder = tiny_path if request.param == "one encoder" else make_xl(tmp_path_factory.mktemp("xl") / "xl")
    return load_model(folder, CPU)


@pytest.fixture(scope="module")
def shifts(model, tmp_path_factory):
    folder, layers = tmp_path_factory.mktemp("shifts"), {"1": 0, "2": LAST_STATE, "3": 0}
    return {label: make_shift(model, label, layers[label], folder) for label in CONCEPTS}


@pytest.fixture(scope="module")
def written(model, shifts, tmp_path_factory):
    """Return the folder of a node with all three concepts."""
    folder = tmp_path_factory.mktemp("custom_nodes") / "made"
    (target,) = export(model, shifts, folder, ExportConfig(("comfyui",)), ["", "VanGogh"]).targets
    assert target.name == "made-comfyui"
    return target


@pytest.fixture
def erase(written):
    return import_node(written)


@pytest.fixture
def clip(model):
    return clip_of(model)


def rows_of(model, embeds, pooled) -> torch.Tensor:
    """Return what ComfyUI encodes as this package has it: XL's pooled embedding is the last row."""
    if "text_encoder_2" not in model.text_encoders:
        return embeds[0]
    return join_streams(embeds, pooled)[0]


@pytest.mark.parametrize("labels", [("1",), ("1", "2"), ("1", "2", "3")])
def test_the_node_gives_what_this_package_gives_bit_for_bit(model, shifts, clip, erase, labels):
    (gated,) = erase(clip, ", ".join(CONCEPTS[label] for label in labels))
    changed = []
    for prompt in [*PLAIN, *FIRES]:
        plain = model.encode_prompt([prompt])[0]
        assert torch.equal(rows_of(model, *clip.encode(prompt)), plain)  # so ComfyUI is imitated well
        with edited(model, {label: shifts[label] for label in labels}, "gated"):
            expected = model.encode_prompt([prompt])[0]
        found = rows_of(model, *gated.encode(prompt))
        used = slice(None) if "text_encoder_2" not in model.text_encoders else slice(len(found) - 1)
        assert torch.equal(found[used], expected[used]), prompt
        width = model.pipeline.text_encoder_2.config.projection_dim if used.stop else None
        assert torch.equal(found[-1, :width], expected[-1, :width])
        if not torch.equal(expected, plain):
            changed.append(prompt)
    assert changed == [prompt for prompt, fired in FIRES.items() if set(fired) & set(labels)]


def test_the_clip_that_comes_in_stays_as_it_was(model, clip, erase):
    before = [clip.encode(prompt)[0] for prompt in FIRES]
    weights = {name: value.clone() for name, value in clip.cond_stage_model.state_dict().items()}
    (gated,) = erase(clip, "all")
    for prompt, embeds in zip(FIRES, before, strict=True):
        assert not torch.equal(gated.encode(prompt)[0], embeds) and torch.equal(clip.encode(prompt)[0], embeds)
    assert gated is not clip and not isinstance(clip.cond_stage_model, comfyui_node.GatedTextEncoders)
    assert list(gated.cond_stage_model.state_dict()) == list(weights)  # for what loads LoRAs and saves
    for name, value in clip.cond_stage_model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert not has_leftovers(clip)


def test_gates_act_before_words_are_weighed(clip, erase):
    (gated,) = erase(clip, "all")
    mapped, empty = gated.encode("a painting by VanGogh")[0].clone(), clip.encode("")[0]
    assert not torch.equal(mapped, clip.encode("a painting by VanGogh")[0])
    mapped[0, 4] = (mapped[0, 4] - empty[0, 4]) * 1.3 + empty[0, 4]
    assert torch.allclose(gated.encode("a painting by VanGogh", weights={4: 1.3})[0], mapped, atol=1e-5)
    plain = clip.encode("a painting of a church", weights={4: 1.3})
    assert torch.equal(gated.encode("a painting of a church", weights={4: 1.3})[0], plain[0])


def test_a_long_prompt_is_gated_section_by_section(clip, erase):
    (gated,) = erase(clip, "all")
    sections = ["a photo of a house", "a painting by VanGogh", "Kandinsky", "Picasso"]
    plain, found = clip.encode(*sections), gated.encode(*sections)
    length = len(clip.tokenize("")["l"][0])
    for number, (before, after) in enumerate(zip(plain[0][0].split(length), found[0][0].split(length), strict=True)):
        assert torch.equal(before, after) == (number in (0, 2))
        alone = gated.encode(sections[number])[0][0]
        assert torch.allclose(after, alone, atol=1e-5)
    if plain[1] is not None:
        assert torch.equal(plain[1], found[1])  # it is that of the first section


def test_two_nodes_in_a_row_are_one_with_both_concepts(model, clip, erase, shifts, tmp_path):
    (target,) = export(model, {"2": shifts["2"]}, tmp_path / "second", ExportConfig(("comfyui",)), [""]).targets
    (first,) = erase(clip, "vangogh")
    (second,) = import_node(target)(first, "all")
    (both,) = erase(clip, "VanGogh,Picasso")
    for prompt in [*PLAIN, *FIRES]:
        assert torch.equal(second.encode(prompt)[0], both.encode(prompt)[0])
    (again,) = erase(both, "all")
    assert len(again.cond_stage_model.srs_me_gates.concepts) == 3
    prompt = "a painting by VanGogh"
    assert torch.equal(first.clone().encode(prompt)[0], first.encode(prompt)[0])  # as after another node
    assert not torch.equal(first.encode(prompt)[0], clip.encode(prompt)[0])


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ("VanGogh, Monet, Manet", "there is no gate of Monet, Manet: write all, or some of VanGogh, Picasso, Cezanne"),
        (" , ", "concepts is empty: write all, or some of VanGogh, Picasso, Cezanne; to erase nothing bypass"),
    ],
)
def test_a_name_that_the_file_has_not_is_an_error_that_lists_those_it_has(clip, erase, concepts, message):
    with pytest.raises(ValueError, match=message):
        erase(clip, concepts)


def test_another_clip_skip_is_an_error_that_says_what_to_set(model, clip, erase):
    (gated,) = erase(clip, "all")
    expected = clip.encode("VanGogh")[0].shape
    is_xl = "text_encoder_2" in model.text_encoders
    gated.layer_idx = -2 if is_xl else -1  # as CLIP Set Last Layer does
    assert gated.encode("VanGogh")[0].shape == expected
    if model.text_encoder.config.num_hidden_layers > 1:
        gated.layer_idx = -1
        with pytest.raises(ValueError, match=r"clip_l stops at layer -1, .* set stop_at_clip_layer .* to -2"):
            gated.encode("VanGogh")
    gated.layer_idx = None
    next(clip.cond_stage_model.children()).defaults = [0, 1], None
    with pytest.raises(ValueError, match=r"clip_l stops at layer \[0, 1\], and these gates are for -"):
        gated.encode("VanGogh")


def test_a_pooled_embedding_without_a_map_is_refused(model, clip, erase):
    (gated,) = erase(clip, "all")
    if "text_encoder_2" in model.text_encoders:
        with pytest.raises(ValueError, match="for the projected pooled embedding"):
            gated.encode("VanGogh", projected=False)
    else:
        assert gated.encode("VanGogh", projected=False)[1] is None


def test_the_text_encoders_of_another_model_are_refused(model, clip, erase):
    other = {f"{name}x": encoder for name, encoder in clip.cond_stage_model.named_children()}
    with pytest.raises(ValueError, match=r"these gates read clip_.* of \w+, and this CLIP has clip_\wx.*: load \w+"):
        erase(Clip(ClipModel(other), clip.tokenizer), "all")
    with pytest.raises(ValueError, match="this CLIP has none that this node knows"):
        erase(Clip(nn.Module(), clip.tokenizer), "all")
    encoder = clip.cond_stage_model.clip_l
    encoder.transformer.set_input_embeddings(nn.Embedding(9, 7))
    with pytest.raises(ValueError, match=r"read states of \d+ numbers of \w+, and those of this CLIP's clip_l have 7"):
        erase(clip, "all")


def test_a_node_that_uses_a_text_encoder_by_itself_is_gated_or_told(model, clip, erase):
    (gated,) = erase(clip, "all")
    tokens = clip.tokenize("a painting by VanGogh")["l"]
    encoder = gated.cond_stage_model.clip_l
    assert encoder.num_layers == clip.cond_stage_model.clip_l.num_layers
    ids = [[token for token, _ in section] for section in tokens]
    with torch.inference_mode():
        if "text_encoder_2" in model.text_encoders:
            with pytest.raises(ValueError, match="encode it by CLIP Text Encode"):
                encoder.encode_token_weights(tokens)
        else:
            expected = gated.encode("a painting by VanGogh")[0]
            assert torch.equal(encoder.encode_token_weights(tokens)[0], expected)
            assert torch.equal(encoder.encode(ids)[0], expected)


def test_what_another_node_put_in_place_of_encode_acts_and_stays(clip, erase):
    encoder, calls = clip.cond_stage_model.clip_l, []
    plain = encoder.encode
    encoder.encode = lambda tokens: calls.append(len(tokens)) or plain(tokens)
    other, (gated,) = encoder.encode, erase(clip, "all")
    assert not torch.equal(gated.encode("VanGogh")[0], clip.encode("VanGogh")[0])
    assert calls == [1, 1] and encoder.encode is other


def test_what_fails_leaves_the_text_encoders_as_they_were(clip, erase):
    (gated,) = erase(clip, "all")
    with pytest.raises(ValueError, match=r"\d"):
        gated.cond_stage_model.encode_token_weights({"l": [[(1, 1.0)], [(1, 1.0), (2, 1.0)]], "g": [[], []]})
    assert not has_leftovers(clip)


def test_a_copy_of_the_gated_clip_is_gated(clip, erase):
    (gated,) = erase(clip, "all")
    copied = deepcopy(gated)
    assert copied.cond_stage_model.wrapped is not clip.cond_stage_model
    assert torch.equal(copied.encode("Picasso")[0], gated.encode("Picasso")[0])


# The folder


def test_the_node_needs_nothing_but_torch_and_safetensors():
    tree = ast.parse((ROOT / "ldm" / "erasure" / "comfyui_node.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch", "safetensors"}


def test_the_folder_says_what_it_is_and_is_written_once(model, shifts, written):
    assert sorted(path.name for path in written.iterdir()) == [
        "README.txt",
        "__init__.py",
        comfyui_node.GATES_FILE,
        METADATA_FILE,
    ]
    assert (written / "__init__.py").read_bytes() == (ROOT / "ldm" / "erasure" / "comfyui_node.py").read_bytes()
    readme = (written / "README.txt").read_text()
    assert "VanGogh, Picasso, Cezanne" in readme and model.config_name in readme and "{" not in readme
    gates = comfyui_node.Gates.read(written / comfyui_node.GATES_FILE)
    assert gates.base_digest == model.digest and [each.name for each in gates.concepts] == list(CONCEPTS.values())
    assert list(read_dir_metadata(written)["merged"]) == list(CONCEPTS)
    with safe_open(written / comfyui_node.GATES_FILE, framework="pt") as opened:
        assert all(shifts[label].content_digest in opened.metadata()["srs-me"] for label in CONCEPTS)
    before = {path.name: path.stat().st_mtime_ns for path in written.iterdir()}
    config, prompts = ExportConfig(("comfyui",)), ["", "VanGogh and Picasso"]
    result = export(model, shifts, written.with_name("made"), config, prompts)
    assert {path.name: path.stat().st_mtime_ns for path in written.iterdir()} == before and not result.truncated
    assert list(result.leakage["gates that fire"]) == ["none", "1, 2"]
    assert result.leakage.margin.gt(0).tolist() == [False, True]


def test_rank_and_precision_do_not_change_gates(model, shifts, written, tmp_path):
    config = ExportConfig(("comfyui", "lora"), "float16", rank=1)
    result = export(deepcopy(model), shifts, tmp_path / "made", config, [""])
    assert [path.name for path in result.targets] == ["made-lora", "made-comfyui"]
    for path in written.iterdir():
        assert (tmp_path / "made-comfyui" / path.name).read_bytes() == path.read_bytes()
    assert {row["formats"] for row in result.truncated} == {"lora"}


def test_a_shift_without_a_gate_is_refused_before_anything_is_written(model, shifts, tmp_path):
    without = deepcopy(shifts["1"])
    without.gated = None
    with pytest.raises(
        ValueError, match=r"the shift of VanGogh has no gate, .*: make it again by SRS-ME with `gate`"
    ) as refused:
        export(model, {**shifts, "1": without}, tmp_path / "out", ExportConfig(("lora", "comfyui")), [""])
    assert not list(tmp_path.iterdir()) and "\n" not in str(refused.value)


def test_a_gate_of_another_model_is_refused_before_anything_is_written(model, shifts, tmp_path):
    shift = deepcopy(shifts["1"])
    shift.gated.gates["text_encoder"] = deepcopy(shift.gated.gates["text_encoder"])
    object.__setattr__(shift.gated.gates["text_encoder"], "weights", torch.ones(1, 5))
    with pytest.raises(ValueError, match="does not fit the model's text encoder"):
        export(model, {"1": shift}, tmp_path / "out", ExportConfig(("comfyui",)), [""])
    assert not list(tmp_path.iterdir())


def test_a_text_encoder_that_comfyui_cannot_have_is_one_line_by_the_script(script, tmp_path):
    shift = tmp_path / "s.safetensors"
    minilm = load_model(ROOT / "models" / "mini-sd-minilm", CPU)
    with pytest.raises(ValueError, match=r"reads prompts by a BertModel, .*CLIP.*: choose another `format`") as refused:
        export_comfyui.check_comfyui(minilm, {})
    assert "\n" not in str(refused.value)
    layers = text_layers(minilm.denoiser)
    made = SeparableShift(
        {layer: torch.ones(part.out_features, 1) for layer, part in layers.items()},
        torch.eye(1, minilm.context_dim).double(),
        1e-3,
    )
    metadata = {"concept": "VanGogh", "concept_index": 1, "category": "style", "base_digest": minilm.digest}
    made.save(shift, metadata)
    flags = ["--model", ROOT / "models" / "mini-sd-minilm", "--shifts", shift, "--save_path", tmp_path / "out"]
    code, _, err = script(MERGE, *flags, "--format", "unet,comfyui")
    assert code == 2 and "--format" in err and len(err.strip().splitlines()) == 1 and "BertModel" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["flux", "sd3", "sd3-without-t5", "pixart-alpha"])
def test_other_families_are_refused_before_anything_is_written(name, tmp_path):
    model = load_model(make_family(name, tmp_path / name), CPU)
    made = SeparableShift.zeros(text_layers(model.denoiser), torch.eye(1, model.text_layers.width).double(), 1.0)
    made.metadata = {"concept": "VanGogh"}
    pipeline = type(model.pipeline).__name__
    message = rf"{name} is a {pipeline}, and ComfyUI's node .*: choose another `format`, such as shift"
    with pytest.raises(ValueError, match=message) as refused:
        export(model, {"1": made}, tmp_path / "out", ExportConfig(("unet", "comfyui")), [""])
    assert "\n" not in str(refused.value) and not list(tmp_path.glob("out*"))


def test_the_script_writes_gates_beside_loras(script, tiny, tmp_path):
    make_shift(tiny, "1", 0, tmp_path)
    flags = ["--model", tiny.pipeline.config._name_or_path, "--shifts", tmp_path / "1.safetensors"]
    flags += ["--save_path", tmp_path / "out"]
    code, out, _ = script(MERGE, *flags, "--format", "comfyui")
    assert code == 0 and "gates that fire" in out and "leakage" not in out
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == "tiny-1-comfyui"
    (gated,) = import_node(folder)(clip_of(tiny), "VanGogh")
    assert not torch.equal(gated.encode("VanGogh")[0], clip_of(tiny).encode("VanGogh")[0])
    code, out, _ = script(MERGE, *flags, "--format", "lora,comfyui")
    assert code == 0 and sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tiny-1-comfyui", "tiny-1-lora"]
