"""Shifts that are gates alone: no null space, no change of weights, and any number of them."""

import json

import pytest
import torch
from conftest import CPU, is_error

from ldm import applied, erase, export, load_model
from ldm.config.concept_lists import make_concept
from ldm.config.methods import GateConfig, SRSMEConfig
from ldm.diffusion.load_text import load_text_model
from ldm.erasure.erase import erase_concepts
from ldm.erasure.export_shift import as_written
from ldm.erasure.merge import by_form, merge
from ldm.erasure.shift import WeightShift
from ldm.io.paths import ArtifactPaths
from ldm.ledger.ledger import HISTORY_FILE, Ledger
from ldm.ledger.operations import verify

FEW = {"retain_captions": 20, "retain_words": 10, "compositions": 5, "misspellings": 0}
FLAGS = [text for name, value in FEW.items() for text in (f"--{name}", value)]
NAMES = ["VanGogh", "Picasso", "a red fox"]


@pytest.fixture(scope="module")
def made(tiny_path, tmp_path_factory):
    """A tiny model and gates alone of three concepts."""
    folder = tmp_path_factory.mktemp("alone")
    model = load_model(tiny_path, CPU)
    return model, erase(model, NAMES, protect="a dog", mode="gate", artifacts_dir=folder, **FEW), folder


def test_a_gate_alone_changes_no_weights_and_acts_in_either_form(made):
    model, shifts, _ = made
    assert list(shifts) == ["vangogh", "picasso", "redfox"]
    assert all(
        shift.is_gate_alone and shift.rank == 0 and not shift.metadata.get("basis_digest") for shift in shifts.values()
    )
    assert merge(model.denoiser, list(shifts.values())) == {}
    before = {text: model.encode_prompt([text]) for text in ("VanGogh", "a dog", "")}
    for form in ("gated", "linear"):
        gated, linear = by_form(shifts, form)
        assert list(gated) == list(shifts) and not linear
        with applied(model, shifts, form):
            after = {text: model.encode_prompt([text]) for text in before}
        assert torch.equal(after["a dog"], before["a dog"]) and torch.equal(after[""], before[""])
        assert not torch.equal(after["VanGogh"], before["VanGogh"])


def test_what_is_measured_of_it_is_what_its_gate_does(made):
    _, shifts, _ = made
    for shift in shifts.values():
        metadata = shift.metadata
        assert metadata["max_leakage_protected"] == 0 and metadata["target_change"] > 0.1
        assert set(metadata["effects"]) == {"gated"} and "a dog" in metadata["protected"]


def test_one_is_made_anew_where_the_prompts_are_others_that_it_leaves_alone(made, tmp_path, capsys):
    model, _, _ = made
    artifacts, config = ArtifactPaths(tmp_path, "SRS-ME", "text", "own", 1, 0), SRSMEConfig(mode="gate")
    picasso, ruiz = make_concept("Picasso"), make_concept("Picasso", aliases=["Pablo Ruiz"])
    counts: list[int] = []
    for other in (make_concept("VanGogh"), make_concept("VanGogh"), make_concept("VanGogh", aliases=["Vincent"])):
        made_now = erase_concepts(
            model, artifacts, [picasso], config, tmp_path, gate=GateConfig(**FEW), others=[picasso, other]
        )
        counts.append(len(made_now))
    assert counts == [1, 0, 1] and "from the same inputs" in capsys.readouterr().out
    for protected, number in (([], 1), (["a red bench"], 1), (["a red bench"], 0)):
        settings = {"gate": GateConfig(**FEW), "others": [ruiz], "protected": protected}
        assert len(erase_concepts(model, artifacts, [ruiz], config, tmp_path, **settings)) == number
    metadata = WeightShift.load(artifacts.shift("picasso")).metadata
    assert "retain" not in metadata and "a red bench" in metadata["protected"]  # which nobody gave as `retain`


def test_those_that_are_fitted_together_took_equally_long(made, tmp_path):
    model, _, _ = made
    artifacts, config = ArtifactPaths(tmp_path, "SRS-ME", "text", "own", 1, 0), SRSMEConfig(mode="gate")
    concepts = [make_concept(name) for name in NAMES]
    summaries = erase_concepts(model, artifacts, concepts, config, tmp_path, gate=GateConfig(**FEW))
    assert len(summaries) == 3 and len({summary.seconds for summary in summaries}) == 1


def test_its_file_has_no_weights_and_is_as_small_as_its_gate(made):
    model, shifts, _ = made
    shift = shifts["vangogh"]
    loaded = WeightShift.load(shift.path)
    loaded.check(model)
    assert loaded.is_gate_alone and not as_written(loaded, torch.float16).tensors(torch.float16, {})


def test_no_weights_hold_it_and_its_own_formats_do(made, tmp_path):
    model, shifts, _ = made
    with pytest.raises(ValueError, match="is a gate alone, which no weights hold: choose `format` shift or comfyui"):
        export(model, shifts, tmp_path / "out", "unet")
    exported = export(model, shifts, tmp_path / "out", "shift", prompts=["VanGogh", "a dog"])
    assert exported.leakage.loc["VanGogh", "gates that fire"] == "vangogh"  # and no leakage of weights, as it has none
    assert all(row["KB"] * 1000 > 500 and row["rank"] == 0 for row in exported.truncated)
    [written] = exported.targets
    card = (written / "VanGogh.md").read_text()
    assert "what takes its place | an artist |" in card and ", by the weights" not in card
    assert len(list(written.glob("*.safetensors"))) == 3
    shared = WeightShift.load(written / "Picasso.safetensors")
    assert shared.is_gate_alone and shared.metadata["target_change"] > 0.1  # what its gate does, not its weights


def test_a_text_encoder_alone_makes_it_too(made, tiny_path, tmp_path):
    artifacts = ArtifactPaths(tmp_path, "SRS-ME", "text", "own", 1, 0)
    concepts, config = [make_concept("VanGogh")], SRSMEConfig(mode="gate")
    erase_concepts(load_text_model(tiny_path, CPU), artifacts, concepts, config, tmp_path, gate=GateConfig(**FEW))
    shift = WeightShift.load(artifacts.shift("vangogh"))
    shift.check(made[0])
    assert shift.is_gate_alone and shift.metadata["measured_on"] == "embeddings"


def test_a_ledger_of_gates_alone_erases_restores_and_proves(script, tiny_path, tmp_path):
    root, names = ["--ledger_dir", tmp_path / "ledger"], ["VanGogh", "Picasso", "a red fox"]
    ledger = "train-scripts/ledger.py"
    assert script(ledger, "init", *root, "--model", tiny_path, "--concepts", *names, "--protect", "a dog")[0] == 0
    code, _, err = script(ledger, "erase", "all", *root, "--mode", "gate", "--least_effect", "-9", *FLAGS)
    assert code in (0, 3), err
    assert script(ledger, "restore", "Picasso", *root)[0] == 0
    kept = Ledger(tmp_path / "ledger" / HISTORY_FILE)
    assert set(kept.active_shifts()) == {"vangogh", "redfox"}
    assert all(shift.is_gate_alone for shift in kept.shifts().values())
    checked = verify(kept, load_model(tiny_path, CPU))
    assert "the base model, bit for bit" in set(checked["check"])


def test_the_gates_of_a_ledger_are_measured_as_they_stand(script, tiny_path, tmp_path):
    """What is erased already stays so when all is, and counts as restored once it is."""
    root, names = ["--ledger_dir", tmp_path / "ledger"], ["VanGogh", "Picasso", "a red fox"]
    ledger, measure = "train-scripts/ledger.py", "eval-scripts/evaluate-gates.py"
    assert script(ledger, "init", *root, "--model", tiny_path, "--concepts", *names)[0] == 0
    is_error(script(measure, *root), "nothing is erased in")
    erase_gated = [*root, "--mode", "gate", "--least_effect", "-9", *FLAGS]
    assert script(ledger, "erase", "VanGogh", *erase_gated)[0] in (0, 3)
    assert "VanGogh is erased already, and stays as it is" in script(ledger, "erase", "all", *erase_gated)[2]
    is_error(script(ledger, "erase", "all", "VanGogh", *erase_gated), "VanGogh is erased already: restore it first")
    assert script(ledger, "restore", "Picasso", *root)[0] == 0
    code, out, err = script(measure, *root, "--num_captions", 20, "--save_path", tmp_path / "out")
    assert code == 0 and "restored concepts" in out, err
    summary = json.loads((tmp_path / "out" / "gates.json").read_text())
    assert summary["gates"] == 2 and summary["seconds_per_gate"] is None
    assert summary["counts"]["restored concepts"]["kept"][1] > 0
    is_error(script(measure, *root, "--restored", "VanGogh"), "--restored is for gates that are made")


def test_of_many_concepts_the_table_shows_what_was_changed(script, tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.cli.ledger._MAX_ROWS", 2)
    root, names = ["--ledger_dir", tmp_path / "ledger"], ["VanGogh", "Picasso", "a red fox"]
    assert script("train-scripts/ledger.py", "init", *root, "--model", tiny_path, "--concepts", *names)[0] == 0
    arguments = [*root, "--mode", "gate", "--least_effect", "-9", *FLAGS]
    out = script("train-scripts/ledger.py", "erase", "Picasso", *arguments)[1]
    assert "| Picasso |" in out and "| VanGogh |" not in out
    assert "3 concepts: 2 never_erased, 1 " in out
    out = script("train-scripts/ledger.py", "restore", "Picasso", *root, "--json")[1]
    assert len(json.loads(out)) == 3


def test_a_ledger_says_which_names_have_no_gate(script, tiny_path, tmp_path):
    root, names = ["--ledger_dir", tmp_path / "ledger"], ["VanGogh", "Picasso", "the"]
    assert script("train-scripts/ledger.py", "init", *root, "--model", tiny_path, "--concepts", *names)[0] == 0
    code, _, err = script("train-scripts/ledger.py", "erase", "all", *root, "--mode", "gate", *FLAGS)
    assert code == 3 and "the: no gate was found" in err and "'the' is said by" in err
    assert set(Ledger(tmp_path / "ledger" / HISTORY_FILE).active_shifts()) == {"vangogh", "picasso"}


def test_flags_that_a_gate_alone_does_not_follow_are_told_and_no_gate_is_refused(script, tiny_path, tmp_path):
    arguments = ["train-scripts/SRS_ME.py", "--model", tiny_path, "--artifacts_dir", tmp_path, "--concepts", "Picasso"]
    is_error(script(*arguments, "--mode", "gate", "--no-gate"), "--mode gate makes gates alone, and --no-gate none")
    code, _, err = script(
        *arguments, "--mode", "gate", "--lr", "0.1", "--rank_rtol", "1e-2", "--retain_words", "10", *FLAGS
    )
    assert code in (0, 3) and "--lr, --rank_rtol: not used, since a gate alone is made: --mode is gate" in err, err
    encoder = ["--text_encoder", tiny_path, "--artifacts_dir", tmp_path / "none", "--concepts", "Picasso"]
    is_error(script("train-scripts/SRS_ME.py", *encoder, "--mode", "learn"), "a text encoder alone")
    assert not (tmp_path / "none").exists()  # nor a null space
    is_error(
        script("train-scripts/SRS_ME.py", "--text_encoder", tiny_path / "unet", *encoder[2:]), "give --text_encoder"
    )


def test_the_gates_of_a_ledger_are_measured_beside_a_linear_shift_and_errors_have_a_file(script, tiny_path, tmp_path):
    root, names = ["--ledger_dir", tmp_path / "ledger"], ["VanGogh", "Picasso"]
    ledger, measure = "train-scripts/ledger.py", "eval-scripts/evaluate-gates.py"
    assert script(ledger, "init", *root, "--model", tiny_path, "--concepts", *names)[0] == 0
    assert script(ledger, "erase", "VanGogh", *root, "--no-gate", "--ridge_weight", "1e9")[0] == 3
    is_error(script(measure, *root), "by a gate: restore one of its concepts")
    assert "too weak to erase VanGogh by SRS-ME" in script(ledger, "history", *root)[1]
    assert script(ledger, "erase", "Picasso", *root, "--mode", "gate", "--least_effect", "-9", *FLAGS)[0] in (0, 3)
    captions = tmp_path / "own.txt"
    captions.write_text("a caption of mine\nart by Picasso, of mine\n")
    out = tmp_path / "out"
    code, _, err = script(measure, *root, "--num_captions", 20, "--captions", captions, "--save_path", out)
    assert code == 0 and "VanGogh: erased without a gate, and left out here" in err
    assert "restored concepts" not in (out / "gates.json").read_text()  # as it is erased
    for name in ("false_alarms", "misses"):
        assert (out / f"{name}.csv").read_text().startswith("prompts,prompt,concept,margin")


def test_a_name_without_a_gate_is_said_and_the_others_are_kept(script, tiny_path, tmp_path):
    arguments = ["--model", tiny_path, "--mode", "gate", "--artifacts_dir", tmp_path, *FLAGS]
    result = script("train-scripts/SRS_ME.py", "--concepts", "VanGogh", "Picasso", "the", *arguments)
    is_error(result, "The gates of the other 2 are kept")
    made = sorted(path.stem for path in tmp_path.rglob("shift-*.safetensors"))
    assert made == ["shift-picasso", "shift-vangogh"]
