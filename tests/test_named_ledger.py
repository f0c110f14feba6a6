"""A ledger of concepts that its owner names: begun, added to, erased from, migrated, and made again from nothing."""

import hashlib
import json
import shlex
import subprocess

import pytest
import torch
from conftest import CPU, is_error

from ldm.cli.reproduce import reproduction_commands
from ldm.config.concept_lists import make_concept
from ldm.config.concepts import Concept, get_concept
from ldm.diffusion.load import load_model
from ldm.erasure.effect import least_effect_met
from ldm.erasure.merge import applied
from ldm.erasure.shift import SeparableShift
from ldm.ledger.ledger import HISTORY_FILE, Ledger, make_header, status_table
from ldm.ledger.operations import weights_hash

LEDGER = "train-scripts/ledger.py"
LIST = "concept,aliases,anchor,kind\nVelmira,Velmira Inc;velmi,a logo,brand\na violin,,,\nGreg Rutkowski,,,style\n"

ACTING = ("erased", "too_weak")  # what a concept is whose shift acts, by its effect on a random model


@pytest.fixture
def owner(script, mini_path, tmp_path):
    """Return what runs the commands of a ledger of the concepts of `LIST`, which is begun."""
    root = tmp_path / "ledger"
    (tmp_path / "mine.csv").write_text(LIST)
    flags = {name: ["--device", "cpu"] for name in ("init", "add", "erase", "verify")}
    flags["init"] += ["--model", mini_path]
    flags["erase"] += ["--least_effect", "-9"]  # a random model's

    def run(command, *arguments, at=root):
        return script(LEDGER, command, *arguments, "--ledger_dir", at, *flags.get(command, []))

    run.root = root
    run.ledger = lambda: Ledger(root / HISTORY_FILE)
    code, out, err = run("init", "--concepts", tmp_path / "mine.csv", "--protect", "a cat")
    assert code == 0 and "3 concepts of mini-sd" in out and "a cat" in out, err
    return run


def rows(out: str) -> dict[str, list[str]]:
    """Return the cells of each row of a status table, by the concept's name."""
    lines = [line for line in out.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in cells}


def rewritten(root, line: int, change) -> None:
    """Let `change` work on one line of a history, and make the digests of all lines fit again."""
    lines, last_hash = [], ""
    for number, text in enumerate((root / HISTORY_FILE).read_text().splitlines()):
        content = json.loads(text) | {"prev_hash": last_hash}
        if number == line:
            change(content)
        lines.append(json.dumps(content, ensure_ascii=False))
        last_hash = hashlib.sha256(lines[-1].encode()).hexdigest()
    (root / HISTORY_FILE).write_text("\n".join(lines) + "\n")


def test_the_first_line_holds_each_concept_whole_and_no_list_is_asked(owner, monkeypatch):
    def missing(*_):
        raise AssertionError("a file that can change was read")

    monkeypatch.setattr("ldm.config.concepts._load_config", missing)
    monkeypatch.setattr("ldm.config.concepts.load_concepts", missing)
    ledger = owner.ledger()
    logo, violin, artist = ledger.concepts
    assert (logo.aliases, logo.anchor, logo.kind) == (("Velmira Inc", "velmi"), "a logo", "brand")
    assert (violin.name, violin.kind, artist.kind, artist.label) == ("violin", "object", "style", "gregrutkowski")
    assert ledger.prompts == ["", "watermark SRS-ME", "CCS 2024", "a cat", "Velmira", "violin", "Greg Rutkowski"]
    assert ledger.find("VELMIRA inc") == logo and ledger.find("a Violin") == violin and ledger.find("0") is None
    assert len(status_table(ledger)) == 3 and len(ledger.history_lines()) == 1


def test_concepts_go_by_name_by_file_and_all_together(owner, tmp_path):
    code, out, err = owner("erase", "greg  rutkowski", "a  violin")
    assert code == 0, err
    table = rows(out)
    assert table["violin"][2] in ACTING and table["Greg Rutkowski"][2] in ACTING
    assert table["Velmira"][2] == "never_erased"
    records = owner.ledger().active_shifts()
    assert list(records) == ["violin", "gregrutkowski"]  # as they stand in the ledger
    for name, record in (("violin", records["violin"]), ("Greg Rutkowski", records["gregrutkowski"])):
        shift = owner.ledger().load(record)
        assert record["target_change"] == shift.metadata["target_change"] == pytest.approx(float(table[name][8]), 1e-3)
        assert float(table[name][9]) == pytest.approx(record["max_leakage_others"], 1e-3)
        assert {"a cat", "Velmira"} <= set(shift.metadata["protected"])
    assert rows(owner("restore", tmp_path / "mine.csv")[1])["violin"][2] == "restored"
    assert all(row[2] in ACTING for row in rows(owner("erase", "all")[1]).values())
    (tmp_path / "two.txt").write_text("velmi\nViolin\n")
    states = [row[2] for row in rows(owner("restore", "two.txt")[1]).values()]
    assert states[:2] == ["restored"] * 2 and states[2] in ACTING
    assert not owner("restore", "all")[2].count("Traceback") and not owner.ledger().active_shifts()
    assert owner("verify")[0] == 0


def test_a_setting_of_the_null_space_or_of_gates_makes_a_shift_anew(owner):
    assert owner("erase", "violin")[0] == 0
    is_error(owner("erase", "violin", "--rank_rtol", "1e-2"), "erased already", "restore it first")
    assert owner("restore", "violin")[0] == 0
    code, _, err = owner("erase", "violin", "--rank_rtol", "1e-2", "--gate", "--retain_captions", "20")
    assert code == 0, err
    first, last = (entry.erase["violin"] for entry in owner.ledger().entries if entry.erase)
    assert first["digest"] != last["digest"] and last["null_space"]["rank_rtol"] == 0.01
    metadata = owner.ledger().load(last).metadata
    assert metadata["rank_rtol"] == 0.01 and metadata["gate_config"]["retain_captions"] == 20
    assert "gate_config" not in owner.ledger().load(first).metadata
    is_error(owner("erase", "Velmira", "--method", "FMN", "--rank_rtol", "1e-2"), "--rank_rtol is no setting of FMN")
    is_error(owner("erase", "Velmira", "--method", "FMN", "--gate"), "--gate is no setting of FMN")


def test_what_is_added_later_is_not_protected_by_what_was_made_before(owner):
    assert owner("erase", "violin")[0] == 0
    before = owner.ledger().max_leakage_others("violin")
    code, out, err = owner("add", "--concepts", "a viola", "Solpano", "--anchor", "a thing")
    assert code == 0 and "added: viola, Solpano" in out, err
    ledger = owner.ledger()
    (measured,) = ledger.entries[-1].leakage.items()
    assert measured[0] == "violin" and ledger.find("viola").anchor == "a thing"
    assert "the shift of violin was made before" in out and f"{measured[1]:.1e}" in out
    assert ("restore them, and erase them with --method SRS-ME" in err) == (measured[1] > 0.05)
    assert ledger.max_leakage_others("violin") == max(before, measured[1])
    assert owner("verify")[0] == 0  # compared with what was there when the shift was made
    assert owner("restore", "violin")[0] == 0
    code, _, err = owner("erase", "violin", "viola", "--rank_rtol", "5e-2")
    assert code == 0, err
    active = owner.ledger().shifts()
    assert {"viola", "Solpano"} <= set(active["violin"].metadata["protected"])
    assert "violin" in active["viola"].metadata["protected"]
    anew = owner.ledger().max_leakage_others("violin")
    assert anew == owner.ledger().last_shift("violin")["max_leakage_others"]
    assert "added viola, Solpano" in owner("history")[1] and owner("verify")[0] == 0


def test_what_is_no_list_of_concepts_begins_no_ledger(owner, tmp_path):
    at = tmp_path / "other"
    for text, words in (
        ("concept\n", "has no concept"),
        (LIST + "greg rutkowski,,,\n", "'greg rutkowski' is there twice"),
        (LIST + "Solpano,VELMI,,\n", "names both"),
    ):
        (tmp_path / "wrong.csv").write_text(text)
        is_error(owner("init", "--concepts", "wrong.csv", at=at), "wrong.csv", words)
    said = ["--protect", "a painting by Greg Rutkowski"]
    is_error(owner("init", "--concepts", "mine.csv", *said, at=at), "says Greg Rutkowski", "leave it out of --protect")
    is_error(owner("init", "--concepts", "0-8", at=at), "these are texts", "--erased_index")
    is_error(owner("init", "--concepts", "dog", "--erased_index", "1", at=at), "give one of them")
    is_error(owner("init", "--concepts", "dog", "--anchor", "neutral", at=at), "a setting of an erasure")
    assert not (at / HISTORY_FILE).exists()
    code, _, err = owner("init", "--concepts", "1984", at=at)
    assert code == 0 and "'1984' is taken as the name of a concept" in err
    assert Ledger(at / HISTORY_FILE).concepts[0].label.startswith("1984-")


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("add", ["--concepts", "GREG Rutkowski"], ["in this ledger already, as Greg Rutkowski"]),
        ("add", ["--concepts", "Velmi"], ["'Velmi' is in this ledger already, as Velmira"]),
        ("add", ["--concepts", "cat"], ["'a cat' says cat"]),
        ("add", ["--erased_index", "1"], ["have no indexes", "--concepts"]),
        ("add", [], ["no concept to erase", "--concepts"]),
        ("erase", ["Greg Rutkovski"], ["no concept of this ledger, did you mean Greg Rutkowski?"]),
        ("erase", ["0"], ["'0' is no concept of this ledger", "Velmira"]),
        ("restore", ["none.csv"], ["there is no list of concepts none.csv"]),
        ("migrate", [], ["of today's version already"]),
    ],
)
def test_what_is_refused_leaves_the_history_as_it_is(owner, command, arguments, words):
    before = (owner.root / HISTORY_FILE).read_bytes()
    is_error(owner(command, *arguments), *words)
    assert (owner.root / HISTORY_FILE).read_bytes() == before


def test_a_concept_cannot_be_changed_in_the_first_line(owner):
    assert owner("erase", "Velmira")[0] == 0
    path = owner.root / HISTORY_FILE
    written = path.read_text()
    path.write_text(written.replace('"velmi"', '"velmo"', 1))
    is_error(owner("status"), "line 2, is not what was written there")
    path.write_text(written)
    for changes in ({"aliases": ["velmo"]}, {"prompt": "Solpano"}, {"anchor_prompt": "a house"}):
        rewritten(owner.root, 0, lambda content, changes=changes: content["concepts"][0].update(changes))
        is_error(owner("verify"), "says", "and the ledger", "from a copy")
        path.write_text(written)
    for wrong in ({"kind": "planet"}, {"aliases": "velmi"}, {"index": "0"}, {"name": "violin", "prompt": "violin"}):
        rewritten(owner.root, 0, lambda content, wrong=wrong: content["concepts"][0].update(wrong))
        is_error(owner("status"), "line 1, is not what was written there")
        path.write_text(written)
    assert owner("verify")[0] == 0


def test_what_has_too_little_effect_is_not_called_erased(tiny, tmp_path):
    concepts = [make_concept(name) for name in ("one", "two", "three", "four")]
    ledger = Ledger.create(tmp_path / HISTORY_FILE, make_header(tiny, "own", concepts, [], {}))
    SeparableShift({"a": torch.ones(2, 1)}, torch.ones(1, 3), 1.0).save(tmp_path / "x.safetensors", {})
    record = {"concept": "x", "method": "SRS-ME", "shift": "x.safetensors"}
    judged = {"one": {"is_erased": True, "effect": 0.9}, "two": {"is_erased": False, "effect": 0.1}, "three": {}}
    judged["four"] = {"is_erased": False, "effect": 0.0, "target_change": 0.0, "max_leakage_others": 0.0}
    ledger.append({label: record | said for label, said in judged.items()})
    table = status_table(ledger).set_index("concept")
    assert table["state"].to_dict() == {
        "one": "erased",
        "two": "too_weak",
        "three": "erased",
        "four": "too_weak",
    }  # the last by an older one
    assert table["effect"].to_dict() == {"one": 0.9, "two": 0.1, "three": "", "four": 0.0}
    assert table.loc["four", ["target_change", "max_leakage_others"]].tolist() == [0.0, 0.0]


def test_what_is_too_weak_is_said_each_time(owner, script):
    flags = ["--ledger_dir", owner.root, "--device", "cpu", "--least_effect", "9"]
    for names in (["Velmira", "violin"], ["VELMIRA", "violin"], ["all"]):  # the second are active already
        code, _, err = script(LEDGER, "erase", *names, *flags)
        assert code == 3 and "not erased: Velmira (" in err and ", violin (" in err
    assert "Greg Rutkowski (" in err
    assert script(LEDGER, "erase", "violin", *flags[:-1], "-9")[0] == 0


def test_the_least_effect_that_is_typed_is_what_the_ledger_asks_for(owner, script):
    assert owner("erase", "violin")[0] == 0
    (record,) = owner.ledger().last_shifts().values()
    met = least_effect_met(owner.ledger().load(record).metadata, "gated")
    for least, expected in ((met - 0.01, 0), (met + 0.01, 3), (9, 3)):
        assert owner("restore", "violin")[0] == 0
        flags = ["--ledger_dir", owner.root, "--device", "cpu", f"--least_effect={least}"]
        assert script(LEDGER, "erase", "violin", *flags)[0] == expected


def test_a_ledger_of_hundreds_names_some_in_an_error(tiny, tmp_path):
    concepts = [make_concept(f"thing {k:03}") for k in range(300)]
    ledger = Ledger.create(tmp_path / HISTORY_FILE, make_header(tiny, "own", concepts, [], {}))
    with pytest.raises(ValueError, match=r"thing 009 and 290 more$") as caught:
        ledger.concept("xyz")
    assert len(str(caught.value)) < 250 and ledger.concept("Thing 123") == concepts[123]


def test_own_concepts_come_after_those_of_a_category(tiny, tmp_path):
    indexed = [get_concept("style", 2), get_concept("style", 1)]
    ledger = Ledger.create(tmp_path / HISTORY_FILE, make_header(tiny, "style", indexed, [], {}))
    own = [make_concept("a red fox"), Concept(-1, "1", "1")]
    with pytest.raises(ValueError, match="'van gogh' is in this ledger already, as VanGogh"):
        ledger.add([make_concept("van gogh")], {})
    ledger.add(own, {"2": 0.5})
    SeparableShift({"a": torch.ones(2, 1)}, torch.ones(1, 3), 1.0).save(tmp_path / "x.safetensors", {})
    record = {"concept": "x", "method": "SRS-ME", "shift": "x.safetensors"}
    ledger.append({concept.label: record for concept in reversed(ledger.concepts)})
    assert list(ledger.active_shifts()) == ["1", "2", "redfox", own[1].label]
    assert ledger.find("1") == own[1] and ledger.find("2") == indexed[0]  # a name before an index
    again = Ledger(ledger.path)
    assert again.concepts == [*indexed, *own] and again.prompts_after(0) == again.prompts[:-2]


@pytest.mark.slow
@pytest.mark.parametrize("plain", [True, False], ids=["texts", "file"])
def test_its_commands_make_the_same_weights_again(owner, script, mini_path, tmp_path, plain):
    root, again = owner.root, tmp_path / "again"
    if plain:
        root = tmp_path / "plain"
        assert owner("init", "--concepts", "a violin", "Greg Rutkowski", at=root)[0] == 0
    assert owner("erase", "violin", "--rank_rtol", "1e-2", at=root)[0] == 0
    assert owner("add", "--concepts", "viola", at=root)[0] == 0
    for command, name in (("restore", "violin"), ("erase", "violin"), ("erase", "all")):
        assert owner(command, name, at=root)[0] == 0
    ledger = Ledger(root / HISTORY_FILE)
    assert any(line.startswith("printf") for line in reproduction_commands(ledger)) != plain
    for line in reproduction_commands(ledger):
        line = line.replace(str(root), str(again))
        if line.startswith("printf"):
            subprocess.run(line, shell=True, check=True, cwd=tmp_path)
            continue
        words = shlex.split(line)
        code, _, err = script(words[1], *words[2:])
        assert code == 0, f"{line}: {err}"
    made = Ledger(again / HISTORY_FILE)
    assert made.concepts == ledger.concepts and made.prompts == ledger.prompts and len(made.entries) == 5
    hashes, model = [], load_model(mini_path, CPU)
    for known in (ledger, made):
        with applied(model.denoiser, list(known.shifts().values())):
            hashes.append(weights_hash(model.denoiser))
    assert hashes[0] == hashes[1]
