"""A file is what its digest says: of a base model, of tensors, of a folder; older versions' are accepted."""

import hashlib
import json
import shutil

import pytest
import torch
from conftest import CPU, is_error, save_unchecked
from safetensors.torch import load_file, save_file
from test_load import make_bert

from ldm.diffusion.load import load_model
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.shift import SHIFT_FILE_TYPE, SeparableShift, WeightShift
from ldm.io.errors import Notice
from ldm.io.files import METADATA_FILE, changed_files, check_metadata, is_written, write_dir_metadata, write_json
from ldm.io.tensors import METADATA_KEY, check_base_model, load_tensors, read_metadata, save_tensors

GENERATE = "eval-scripts/generate-images-merge.py"


def swap_words(model, first: str, second: str) -> None:
    """Let two words of a model's vocabulary change places, in all files that say it."""
    for path in (model / "tokenizer").glob("*.json"):
        text = path.read_text().replace(f'"{first}</w>"', '"?"').replace(f'"{second}</w>"', f'"{first}</w>"')
        path.write_text(text.replace('"?"', f'"{second}</w>"'))


@pytest.fixture
def swapped_path(tiny_path, tmp_path):
    folder = shutil.copytree(tiny_path, tmp_path / "swapped")
    swap_words(folder, "vangogh", "picasso")
    return folder


def make_shift(model, path, **metadata):
    """Write a shift of nothing for a model, and return its path."""
    coefficients = {name: torch.ones(layer.out_features, 1) for name, layer in text_layers(model.denoiser).items()}
    shift = SeparableShift(coefficients, torch.eye(1, model.context_dim), 1.0)
    known = {
        "base_digest": model.digest,
        "base_model": "tiny",
        "concept_index": 1,
        "category": "style",
        "method": "SRS-ME",
    }
    shift.save(path, {**known, **metadata})
    return path


def test_a_base_models_digest_counts_its_tokenizer(tiny, swapped_path, tiny_path, tmp_path, script):
    swapped = load_model(swapped_path, CPU)
    assert swapped.pipeline.tokenizer("VanGogh").input_ids == tiny.pipeline.tokenizer("Picasso").input_ids
    assert swapped.digests[1] == tiny.digests[1] and swapped.digest != tiny.digest and tiny.digest.startswith("2:")
    path = make_shift(tiny, tmp_path / "shift.safetensors")
    (tmp_path / "list.csv").write_text("prompt,evaluation_seed,case_number\nVanGogh,1,0\n")
    flags = ["--prompts_path", tmp_path / "list.csv", "--save_path", tmp_path / "out", "--ddim_steps", "1"]
    is_error(script(GENERATE, "--model", swapped_path, "--shifts", path, *flags), "another base model")
    assert not (tmp_path / "out").exists()
    assert script(GENERATE, "--model", tiny_path, "--shifts", path, *flags)[0] == 0


def test_a_base_models_digest_counts_what_its_configs_say_beside_its_weights(tiny, tiny_path, tmp_path):
    digests, metadata = [tiny.digest], [tiny.generation_metadata]
    for part, changes in (
        ("text_encoder", {"hidden_act": "gelu"}),
        ("unet", {"act_fn": "gelu"}),
        ("unet", {"sample_size": 4}),
        ("vae", {"norm_num_groups": 2}),
        ("tokenizer", {"pad_token": "!"}),
    ):
        folder = shutil.copytree(tiny_path, tmp_path / f"{part}{len(digests)}")
        path = folder / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        model = load_model(folder, CPU)
        digests.append(model.digest)
        metadata.append(model.generation_metadata)
    assert [digest == tiny.digest for digest in digests] == [True, False, False, True, True, False]
    assert all(changed != metadata[0] for changed in metadata[1:])


def test_the_digest_of_a_model_with_a_bert_counts_words_weights_and_heads(tmp_path):
    folder = make_bert(tmp_path / "bert")
    encoder, tokenizer = folder / "text_encoder", folder / "tokenizer"
    contents = {path: path.read_bytes() for path in (*encoder.iterdir(), *tokenizer.iterdir())}
    digests = [load_model(folder, CPU).digest]

    def swap_two_words() -> None:
        path = tokenizer / "tokenizer.json"
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["church"], vocabulary["artist"] = vocabulary["artist"], vocabulary["church"]
        path.write_text(json.dumps(content))

    def change_a_weight() -> None:
        tensors = load_file(encoder / "model.safetensors")
        tensors["encoder.layer.1.output.dense.bias"] += 0.5
        save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})

    def change(path, **changes) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    changes = [
        swap_two_words,
        change_a_weight,
        lambda: change(encoder / "config.json", num_attention_heads=2),
        lambda: change(encoder / "config.json", hidden_act="relu"),
        lambda: change(tokenizer / "tokenizer_config.json", model_max_length=8),
        lambda: change(encoder / "config.json", dtype="float16"),
        lambda: change(encoder / "config.json", use_cache=False),
    ]
    for apply in changes:
        apply()
        digests.append(load_model(folder, CPU).digest)
        for path, content in contents.items():
            path.write_bytes(content)
    base, *others = digests
    assert others[-2:] == [base, base]  # which make no other model
    assert len({base, *others[:-2]}) == 6


def test_a_digest_of_version_1_is_accepted_with_a_notice(tiny, tmp_path):
    path = make_shift(tiny, tmp_path / "shift.safetensors", base_digest=tiny.digests[1])
    with pytest.warns(Notice, match="a digest of an older version, which leaves the tokenizer out"):
        WeightShift.load(path).check(tiny)
    with pytest.raises(ValueError, match="another base model"):
        check_base_model({"base_digest": "2:0"}, tiny, path)


def flip(path, position: int) -> None:
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["coefficient", "direction", "scale", "concept"])
def test_a_flipped_bit_of_a_shift_is_seen(tiny, tiny_path, tmp_path, script, where):
    path = make_shift(tiny, tmp_path / "shift.safetensors", concept="VanGogh")
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    places = {
        "coefficient": len(content) - 1,
        "direction": end + 3,
        "scale": content.index(b"scale") + len(b'scale\\": 1.'),
        "concept": content.index(b"VanGogh"),
    }
    flip(path, places[where])
    with pytest.raises(ValueError, match="is not as it was written"):
        WeightShift.load(path)
    assert read_metadata(path, SHIFT_FILE_TYPE) == {}  # so that it is made again where it should be
    merge = ["--model", tiny_path, "--shifts", path, "--save_path", tmp_path / "out"]
    is_error(script("train-scripts/Merge_model.py", *merge), "shift.safetensors is not as it was written")
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_digest_is_accepted_with_a_notice_or_checked_by_the_sums_beside_it(tmp_path):
    path = save_unchecked(tmp_path / "old.safetensors", {"x": torch.ones(2)}, "thing", {"a": 1})
    with pytest.warns(Notice, match="a thing of an older version, has no digest of its contents"):
        tensors, metadata = load_tensors(path, "thing")
    assert metadata == {"a": 1} and tensors.content_digest
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  old.safetensors\n")
    assert load_tensors(path, "thing")[0].content_digest == tensors.content_digest
    flip(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match="is not the file that SHA256SUMS beside it names"):
        load_tensors(path, "thing")


def test_the_digest_of_contents_is_that_of_names_types_shapes_and_bits(tmp_path):
    digests = set()
    for n, tensors in enumerate(({"x": torch.ones(2, 1)}, {"x": torch.ones(1, 2)}, {"y": torch.ones(2, 1)}, {})):
        for metadata in ({"a": 1}, {"a": 2}):
            path = tmp_path / f"{n}{metadata['a']}.safetensors"
            save_tensors(path, tensors, "thing", metadata)
            digests.add(load_tensors(path, "thing")[0].content_digest)
    assert len(digests) == 8


def test_nothing_that_is_not_finite_is_written(tmp_path):
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=r"a\.safetensors is not written: x would hold NaN or infinity"):
            save_tensors(tmp_path / "a.safetensors", {"x": torch.tensor([1.0, value])}, "thing", {})
    with pytest.raises(ValueError, match="does not fit into float16"):
        save_tensors(tmp_path / "a.safetensors", {"x": torch.tensor([1e5]).half()}, "thing", {})
    assert not list(tmp_path.iterdir())


def test_a_folder_is_what_its_digests_say(tmp_path):
    folder, metadata = tmp_path / "folder", {"created_by": "srs-me", "a": 1}

    def write() -> None:
        (folder / "part").mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_bytes(b"abc")
        (folder / "part" / "config.json").write_text("{}")
        write_dir_metadata(folder, metadata)

    assert not is_written(folder, metadata)
    folder.mkdir()
    assert not is_written(folder, metadata)  # an empty folder is none
    write()
    assert is_written(folder, metadata) and changed_files(folder) == []
    for damage in (
        lambda: (folder / "weights").write_bytes(b"abd"),
        lambda: (folder / "weights").unlink(),
        lambda: (folder / "part" / "config.json").unlink(),
    ):
        damage()
        with pytest.warns(Notice, match="is not as it was written .*: it is written again"):
            assert not is_written(folder, metadata)
        write()
    (folder / "notes.txt").write_text("the owner's own")
    assert is_written(folder, metadata)
    (folder / "weights").unlink()
    with pytest.raises(
        ValueError, match=r"weights.*notes\.txt there is not this program's: choose another `save_path`"
    ):
        is_written(folder, metadata)
    with pytest.raises(ValueError, match="another run made"):
        is_written(folder, metadata | {"a": 2})
    (folder / METADATA_FILE).unlink()
    with pytest.raises(ValueError, match="holds files that no run made"):
        is_written(folder, metadata)
    write_json(folder / METADATA_FILE, metadata)  # as an older version did
    with pytest.warns(Notice, match="by an older version, without digests of its files"):
        assert is_written(folder, metadata)
    (folder / METADATA_FILE).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no JSON"):
        is_written(folder, metadata)


def test_a_folder_of_another_version_of_a_shift_is_refused_and_of_none_is_noticed(tmp_path):
    shift = {"concept": "VanGogh", "base_digest": "2:today", "content_digest": "a"}
    write_json(tmp_path / METADATA_FILE, {"shifts": {"1": shift}})
    check_metadata(tmp_path, {"shifts": {"1": shift}}, ["2:today", "then"])
    with pytest.raises(ValueError, match="another run made"):
        check_metadata(tmp_path, {"shifts": {"1": shift | {"content_digest": "b"}}}, ["2:today", "then"])
    older = {"concept": "VanGogh", "base_digest": "then"}
    write_json(tmp_path / METADATA_FILE, {"shifts": {"1": older}})
    with pytest.warns(Notice, match="did not write down all that decides"):
        check_metadata(tmp_path, {"shifts": {"1": shift}}, ["2:today", "then"])
    with pytest.raises(ValueError, match="another run made"):
        check_metadata(tmp_path, {"shifts": {"1": shift | {"base_digest": "2:other"}}}, ["2:other", "another"])


WRONG = {
    "captions": 5,
    "protected": "VanGogh",
    "concept": 7,
    "concept_index": "1",
    "iterations": -1,
    "scale": "1",
    "config": [],
    "prompt": None,
    "target_change": {},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_header_that_says_what_no_shift_can_is_refused(tiny, tmp_path, name):
    path = make_shift(tiny, tmp_path / "shift.safetensors")
    tensors, metadata = load_tensors(path, SHIFT_FILE_TYPE)
    save_tensors(tmp_path / "wrong.safetensors", tensors, SHIFT_FILE_TYPE, metadata | {name: WRONG[name]})
    with pytest.raises(ValueError, match=rf"wrong\.safetensors (says '.*' for {name}|has tensors of wrong names)"):
        WeightShift.load(tmp_path / "wrong.safetensors")


def test_a_header_too_deep_to_read_is_refused(tmp_path):
    for header in ("[" * 100_000, json.dumps([1]), "{", "null", '{"file_type": "thing", "metadata": 3}'):
        save_file({"x": torch.ones(1)}, tmp_path / "deep.safetensors", metadata={METADATA_KEY: header})
        with pytest.raises(ValueError, match=r"deep\.safetensors is (damaged|not a thing)"):
            load_tensors(tmp_path / "deep.safetensors", "thing")
