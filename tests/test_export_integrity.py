"""What an earlier export wrote stays only if its files are as they were written, and nothing is half written."""

import json

import pytest
from test_export import make_shift

from ldm.config.methods import LINEAR_FORMATS, ExportConfig
from ldm.erasure.export import export
from ldm.erasure.shift import WeightShift
from ldm.io.errors import Notice
from ldm.io.files import METADATA_FILE, read_dir_metadata


@pytest.fixture
def shifts(tiny):
    return {"1": make_shift(tiny, "VanGogh", 1), "2": make_shift(tiny, "Jackson Pollock", 2)}


def contents(folder) -> dict[str, bytes]:
    """Return the bytes of every file below a folder, by its relative path."""
    return {part.relative_to(folder).as_posix(): part.read_bytes() for part in folder.rglob("*") if part.is_file()}


def flip_a_byte(target):
    path = max(target.rglob("*.safetensors"), key=lambda part: part.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def delete_a_file(target):
    max(target.rglob("*.safetensors")).unlink()


def delete_half(target):
    for path in sorted(target.rglob("*.*"))[::2]:
        if path.name != METADATA_FILE:
            path.unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, delete_a_file, delete_half])
def test_a_damaged_export_is_written_again_byte_for_byte(damage, tiny, shifts, tmp_path):
    targets = export(tiny, shifts, tmp_path / "out", ExportConfig(LINEAR_FORMATS), [""]).targets
    first = {target: contents(target) for target in targets}
    for target in targets:
        damage(target)
        assert contents(target) != first[target]
    with pytest.warns(Notice, match="is written again") as given:
        export(tiny, shifts, tmp_path / "out", ExportConfig(LINEAR_FORMATS), [""])
    assert {target: contents(target) for target in targets} == first
    assert all(any(f"{target} is not" in str(notice.message) for notice in given) for target in targets)


def test_an_empty_folder_is_written_and_a_foreign_file_is_left_alone(tiny, shifts, tmp_path):
    config, target = ExportConfig(("unet",)), tmp_path / "out-unet"
    target.mkdir()
    export(tiny, shifts, tmp_path / "out", config, [""])
    flip_a_byte(target)
    (target / "notes.txt").write_text("mine")
    before = contents(target)
    with pytest.raises(ValueError, match=r"notes\.txt there is not this program's") as refused:
        export(tiny, shifts, tmp_path / "out", config, [""])
    assert contents(target) == before and "\n" not in str(refused.value)


def test_weights_of_a_shift_since_made_otherwise_are_another_runs(tiny, shifts, tmp_path):
    config, made = ExportConfig(("compvis", "lora", "unet")), {}
    for name, factor in (("first", 1.0), ("repaired", 1.01)):
        for weight in shifts["1"].coefficients.values():
            weight.data *= factor
        shifts["1"].save(tmp_path / f"{name}.safetensors", shifts["1"].metadata)
        made[name] = WeightShift.load(tmp_path / f"{name}.safetensors")
    assert made["first"].metadata == made["repaired"].metadata
    export(tiny, {"1": made["first"]}, tmp_path / "out", ExportConfig(("unet",)), [""])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="another run"):
        export(tiny, {"1": made["repaired"]}, tmp_path / "out", config, [""])
    assert contents(tmp_path) == before  # nor are the formats written that come first
    metadata = read_dir_metadata(tmp_path / "out-unet")
    del metadata["files"], metadata["merged"]["1"]["content_digest"]
    (tmp_path / "out-unet" / METADATA_FILE).write_text(json.dumps(metadata))  # as an older version wrote it
    before = contents(tmp_path)
    with pytest.warns(Notice, match="older version"):
        export(tiny, {"1": made["repaired"]}, tmp_path / "out", ExportConfig(("unet",)), [""])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("formats", [("unet",), ("lora",), ("lora", "compvis"), ("kohya", "diffusers")])
def test_what_does_not_fit_into_half_precision_is_refused_by_name(formats, tiny, shifts, tmp_path):
    base, config = tiny.denoiser.conv_in.weight, ExportConfig(formats, "float16", rank=12)
    base.data[0] = 1e5
    if formats != ("lora",):  # which holds no weights of the base
        with pytest.raises(ValueError, match=r"conv_in\.weight .*`save_dtype` bfloat16"):
            export(tiny, shifts, tmp_path / "out", config, [""])
    assert not list(tmp_path.iterdir())
    base.data[0] = 0.0
    for weight in shifts["2"].coefficients.values():
        weight.data *= 1e6
    with pytest.raises(ValueError, match=r"attn2\.to_[kv]\S*weight would .*`save_dtype` bfloat16") as refused:
        export(tiny, shifts, tmp_path / "out", config, [""])
    assert not list(tmp_path.iterdir()) and "\n" not in str(refused.value)
    export(tiny, shifts, tmp_path / "out", ExportConfig(formats, "bfloat16", rank=12), [""])
