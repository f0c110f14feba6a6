"""What is active is what a ledger's history says, whoever writes, and whenever one is killed.

CHANGES=100 KILLS=20 is the whole trial.
"""

import errno
import hashlib
import json
import os
import random
import time

import pytest
import torch
from conftest import CPU, is_error, start_script
from safetensors.torch import load_file

from ldm.config.concepts import get_concept
from ldm.diffusion.load import load_model
from ldm.erasure.merge import applied
from ldm.erasure.shift import SHIFT_FILE_TYPE, SeparableShift
from ldm.io.files import file_digest
from ldm.io.tensors import load_tensors, save_tensors
from ldm.ledger.ledger import HISTORY_FILE, Ledger, make_header
from ldm.ledger.operations import verify, weights_hash

LEDGER = "train-scripts/ledger.py"
CHANGES, KILLS = int(os.environ.get("CHANGES", "12")), int(os.environ.get("KILLS", "3"))


@pytest.fixture
def ledger(tiny, tmp_path):
    """Begin a ledger of nine styles, with a shift for each in a file."""
    for index in range(9):
        shift = SeparableShift({"a": torch.full((2, 1), float(index))}, torch.ones(1, 3), 1.0)
        shift.save(tmp_path / f"{index}.safetensors", {})
    concepts = [get_concept("style", index) for index in range(9)]
    return Ledger.create(tmp_path / HISTORY_FILE, make_header(tiny, "style", concepts, ["a cat"], {}))


def record(index: int) -> dict:
    return {"concept": get_concept("style", index).name, "method": "SRS-ME", "shift": f"{index}.safetensors"}


def test_what_is_active_is_what_the_changes_made_at_every_line(ledger):
    rng = random.Random(0)
    active: set[str] = set()
    states = [active]
    for _ in range(30):
        changed = set(rng.sample("012345678", rng.randint(1, 3)))
        ledger.append({label: record(int(label)) for label in changed - active}, changed & active)
        active = active ^ changed
        states.append(active)
    for known in (ledger, Ledger(ledger.path)):
        assert [set(known.active_shifts(number)) for number in range(31)] == states
        assert set(known.active_shifts()) == active and list(known.active_shifts()) == sorted(active)
        assert list(known.shifts()) == sorted(active)
    assert len(ledger.history_lines()) == 31 and ledger.prompts[:4] == ["", "watermark SRS-ME", "CCS 2024", "a cat"]


def test_what_is_erased_is_not_erased_again_and_a_shift_is_made_once(ledger):
    one, two = get_concept("style", 1), get_concept("style", 2)
    assert ledger.plan_erasure([one, two, one], False) == ({}, [one, two])
    ledger.append({"1": record(1)})
    assert ledger.plan_erasure([one, two], False) == ({}, [two])
    with pytest.raises(ValueError, match="VanGogh is erased already"):
        ledger.plan_erasure([one], True)
    for change in (({"1": record(1)}, []), ({}, ["2"])):
        before = ledger.path.read_bytes()
        with pytest.raises(ValueError, match="only what is not erased"):
            ledger.append(*change)
        assert ledger.path.read_bytes() == before
    ledger.append({}, ["1"])
    reused, missing = ledger.plan_erasure([one], False)
    assert list(reused) == ["1"] and not missing and ledger.plan_erasure([one], True) == ({}, [one])


@pytest.mark.parametrize("line", range(4))
def test_no_line_can_be_changed_dropped_or_doubled_unseen(ledger, line):
    for index in range(3):
        ledger.append({str(index): record(index)})
    lines = ledger.path.read_text().splitlines(keepends=True)
    before, after = lines[:line], lines[line + 1 :]
    tampered = [[*before, lines[line], lines[line], *after], [*before, "{}\n", *after], [*before, "\x00\n", *after]]
    if line < 3:  # of the last line none knows but its owner: verify prints its digest
        tampered += [[*before, *after], [*before, lines[line].replace('"time": "2', '"time": "3'), *after]]
    for wrong in tampered:
        ledger.path.write_text("".join(wrong))
        with pytest.raises(ValueError, match="is not what was written there"):
            Ledger(ledger.path)
    ledger.path.write_text("".join(lines))
    assert Ledger(ledger.path).last_hash == ledger.last_hash


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (0, {"concepts": [99]}),
        (0, {"concepts": []}),
        (0, {"concepts": [{"index": 1, "name": "VanGogh"}]}),
        (0, {"concepts": [get_concept("style", 1).to_dict()] * 2}),
        (0, {"version": 3}),
        (0, {"version": 1}),
        (0, {"migrated_from": {"file": "../x", "sha256": ""}}),
        (0, {"category": "x"}),
        (0, {"protected": [3]}),
        (0, {"base_model": None}),
        (1, {"erase": {"77": record(1)}}),
        (1, {"erase": {"1": record(1) | {"shift": "../../1.safetensors"}}}),
        (1, {"erase": {"1": record(1) | {"digest": 5}}}),
        (1, {"erase": {"1": "x"}}),
        (1, {"restore": ["3"]}),
        (1, {"restore": [1]}),
        (1, {"restore": 3}),
        (1, {"time": 3}),
        (1, {"add": [get_concept("style", 1).to_dict()]}),
        (1, {"add": 5}),
        (1, {"leakage": {"x": 1.0}}),
    ],
)
def test_a_history_that_was_made_up_is_refused(ledger, line, wrong):
    ledger.append({"1": record(1)})
    lines, last_hash = [], ""
    for number, text in enumerate(ledger.path.read_text().splitlines()):  # with digests that fit
        changes = wrong if number == line else {}
        lines.append(json.dumps({**json.loads(text), "prev_hash": last_hash, **changes}))
        last_hash = hashlib.sha256(lines[-1].encode()).hexdigest()
    ledger.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"line {line + 1}, is not what was written there"):
        Ledger(ledger.path)


def test_a_text_with_separators_of_its_own_does_not_split_its_line(tiny, tmp_path):
    prompts = ["a\u2028b", "c\u0085d", "e\x1cf", "g\rh", "i\nj"]
    concepts = [get_concept("style", index) for index in range(2)]
    ledger = Ledger.create(tmp_path / HISTORY_FILE, make_header(tiny, "style", concepts, prompts, {}))
    SeparableShift({"a": torch.ones(2, 1)}, torch.ones(1, 3), 1.0).save(tmp_path / "1.safetensors", {})
    ledger.append({"1": record(1)})
    again = Ledger(ledger.path)
    assert again.header["protected"][3:] == prompts and len(again.entries) == 1


def test_a_folder_of_shifts_may_be_a_link(ledger, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "ledger"
    root.mkdir()
    (root / HISTORY_FILE).write_bytes(ledger.path.read_bytes())
    (root / "shifts").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "1.safetensors").rename(root / "shifts" / "1.safetensors")
    linked = Ledger(root / HISTORY_FILE)
    linked.append({"1": record(1) | {"shift": "shifts/1.safetensors"}})
    assert list(Ledger(root / HISTORY_FILE).shifts()) == ["1"]


def test_what_could_not_be_read_back_is_not_written(ledger):
    before = ledger.path.read_bytes()
    for wrong in ({"rank": "two"}, {"concept": None}, {"method": "guess"}, {"bytes": -1}, {"iterations": float("nan")}):
        with pytest.raises(ValueError, match="nothing was written"):
            ledger.append({"1": record(1) | wrong})
        assert ledger.path.read_bytes() == before


@pytest.mark.parametrize("torn", [b'{"index": 2, "ti', b"\0" * 40, b'{"a": "\xc3', b"[" * 100_000 + b"\n", b"x\n"])
def test_a_torn_last_line_is_cut_off_into_a_file_beside_it(ledger, script, torn):
    ledger.append({"1": record(1)})
    before = ledger.path.read_bytes()
    ledger.path.write_bytes(before + torn)
    is_error(script(LEDGER, "status", "--ledger_dir", ledger.root), "torn", "repair cuts it off")
    code, out, err = script(LEDGER, "repair", "--ledger_dir", ledger.root)
    (cut_off,) = ledger.root.glob("history.jsonl.torn-*")
    assert code == 0 and str(cut_off) in out and "entry 1" in out, err
    assert ledger.path.read_bytes() == before and cut_off.read_bytes() == torn
    assert "nothing is torn" in script(LEDGER, "repair", "--ledger_dir", ledger.root)[1]


def test_what_is_altered_is_not_repaired(ledger, script):
    ledger.append({"1": record(1)})
    ledger.append({"2": record(2)})
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    last = lines[2].replace(b'"index": 2', b'"index": 3')
    for content, words in (
        ([*lines[:2], last], "not torn but altered"),
        ([lines[0], b"x\n", lines[2]], "more than the last line"),
        ([lines[0][:-9]], "more than the last line"),
    ):
        ledger.path.write_bytes(b"".join(content))
        is_error(script(LEDGER, "repair", "--ledger_dir", ledger.root), words, "from a copy")
        assert ledger.path.read_bytes() == b"".join(content)


def test_a_file_system_without_locks_is_named(ledger, script, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    is_error(
        script(LEDGER, "restore", "VanGogh", "--ledger_dir", ledger.root), "cannot be locked", "No locks available"
    )


def test_verify_compares_a_shift_with_its_entry(owner, script, mini_path):
    """Whoever writes the history anew can make every digest fit; the shift itself says something else."""
    assert owner("erase", "VanGogh")[0] == 0
    history = owner.root / HISTORY_FILE
    header, entry = (json.loads(line) for line in history.read_text().splitlines())
    path = owner.root / entry["erase"]["1"]["shift"]
    kept = path.read_bytes()
    tensors, metadata = load_tensors(path, SHIFT_FILE_TYPE)
    tensors = dict(tensors)

    def verify_with(**changes) -> tuple[int, str, str]:
        """Run verify on a history whose digests fit, with changes of the entry's record or of the shift's metadata."""
        of_record = {name: changes.pop(name) for name in list(changes) if name in ("concept", "max_leakage_others")}
        if changes:
            save_tensors(path, tensors, SHIFT_FILE_TYPE, metadata | changes)
        changed = entry["erase"]["1"] | of_record | {"digest": file_digest(path), "bytes": path.stat().st_size}
        lines = [json.dumps(header)]
        prev_hash = hashlib.sha256(lines[0].encode()).hexdigest()
        lines.append(json.dumps(entry | {"prev_hash": prev_hash, "erase": {"1": changed}}))
        history.write_text("\n".join(lines) + "\n")
        result = owner("verify")
        path.write_bytes(kept)
        return result

    code, out, err = verify_with()
    assert code == 0 and "its own prompt changes by" in out and "cannot prove" in out, err
    is_error(verify_with(concept="Picasso"), "says concept VanGogh", "Picasso")
    is_error(verify_with(max_leakage_others=0.5), "max_leakage_others is", "5.0e-01")
    is_error(verify_with(method="FMN"), "says method FMN")
    is_error(verify_with(protected=[""]), "does not protect")
    is_error(verify_with(target_change=0.01), "target_change is")


def test_another_file_in_a_shifts_place_is_refused(ledger, tmp_path):
    ledger.append({"1": record(1)})
    (tmp_path / "1.safetensors").write_bytes((tmp_path / "2.safetensors").read_bytes())
    for refuses in (ledger.shifts, lambda: ledger.load(ledger.last_shift("1"))):
        with pytest.raises(ValueError, match="not the file that was activated"):
            refuses()
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(ValueError, match="missing"):
        ledger.shifts()


@pytest.fixture
def owner(script, mini_path, tmp_path):
    """Begin a ledger of the nine styles of a tiny model, and return what runs its commands."""
    root = tmp_path / "ledger"
    flags = {
        "init": ["--model", mini_path, "--device", "cpu", "--protect", "a cat"],
        "verify": ["--device", "cpu"],
        "erase": ["--device", "cpu", "--least_effect", "-9"],  # a random model's
        "export": ["--device", "cpu"],
    }

    def run(command, *arguments):
        return script(LEDGER, command, *arguments, "--ledger_dir", root, *flags.get(command, []))

    run.root = root
    assert run("init")[0] == 0
    return run


def test_erase_restore_status_history_verify_and_export(owner, mini_path):
    assert owner("erase", "Van Gogh", "2")[0] == 0 and owner("restore", "picasso")[0] == 0
    made = {path: path.read_bytes() for path in owner.root.rglob("*.safetensors")}
    out = owner("erase", "PICASSO")[1]
    assert {path: path.read_bytes() for path in owner.root.rglob("*.safetensors")} == made  # the shift of then
    rows = {row.split(" | ")[1]: row for row in out.splitlines()}
    assert "| too_weak | SRS-ME |" in rows["Picasso"]  # by the effect of its shift on a random model
    assert "| never_erased |" in rows["Cezanne"]
    assert "VanGogh" in owner("history")[1]
    assert owner("erase", "VanGogh")[0] == 0 and len(Ledger(owner.root / HISTORY_FILE).entries) == 3  # nothing to do
    assert "Cezanne is not erased, and stays as it is" in owner("restore", "Cezanne")[2]
    base = load_model(mini_path, CPU)
    ledger, model = Ledger(owner.root / HISTORY_FILE), load_model(mini_path, CPU)
    checked = verify(ledger, model).set_index("item").sha256
    with applied(model.denoiser, list(ledger.shifts().values())):
        assert checked["2 shifts merged"] == weights_hash(model.denoiser)[:12]
    assert checked["no shift"] == weights_hash(base.denoiser)[:12] and owner("verify")[0] == 0
    assert owner("export", "--format", "unet")[0] == 0
    written = load_file(owner.root / "export" / f"{base.name}-12-unet" / "diffusion_pytorch_model.safetensors")
    active: dict[str, dict] = {}  # from the history alone, by other means
    for line in (owner.root / HISTORY_FILE).read_text().splitlines()[1:]:
        content = json.loads(line)
        together = active | content["erase"]
        active = {index: shift for index, shift in together.items() if index not in content["restore"]}
    for name, weight in base.denoiser.state_dict().items():
        total = weight.double()
        for shift in active.values():
            tensors = load_file(owner.root / shift["shift"])
            if name.removesuffix(".weight") in base.text_layers:
                total = total + weight.double() @ tensors["outputs"].double() @ tensors["directions"].double()
        torch.testing.assert_close(written[name], total.float(), rtol=2e-7, atol=1e-9)


def test_what_a_ledger_refuses(owner, script, other_path, tmp_path):
    is_error(owner("init"), "has a ledger already", "--ledger_dir")
    is_error(owner("erase", "Matisse"), "'Matisse' is no concept of this ledger", "VanGogh")
    is_error(owner("erase", "../../etc"), "no concept")
    is_error(owner("export"), "nothing is erased")
    settings = ["--method", "FMN", "--ridge_weight", "1"]
    is_error(owner("erase", "1", *settings), "--ridge_weight is no setting of FMN")
    is_error(script(LEDGER, "status", "--ledger_dir", tmp_path / "none"), "no ledger in", "ledger.py init")
    assert owner("erase", "1")[0] == 0
    is_error(owner("erase", "1", "--ridge_weight", "1"), "erased already", "restore it first")
    verify_flags = ["--ledger_dir", owner.root, "--model", other_path, "--device", "cpu"]
    is_error(script(LEDGER, "verify", *verify_flags), "another base model")
    assert len(Ledger(owner.root / HISTORY_FILE).entries) == 1


def run(root, command: str, *names: str):
    device = ["--device", "cpu", "--least_effect", "-9"] if command == "erase" else []
    return start_script([LEDGER, command, *names, "--ledger_dir", root, *device], root / f"{os.urandom(4).hex()}.log")


@pytest.mark.slow
def test_several_owners_at_once_lose_no_change(owner):
    processes = [run(owner.root, "erase", str(index)) for index in range(4)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    ledger = Ledger(owner.root / HISTORY_FILE)
    assert set(ledger.active_shifts()) == set("0123") and len(ledger.entries) == 4
    processes = [run(owner.root, "restore", str(index)) for index in range(4)] + [run(owner.root, "erase", "5")]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 5
    assert set(Ledger(owner.root / HISTORY_FILE).active_shifts()) == {"5"}


@pytest.mark.kill
def test_random_changes_with_kills_leave_the_state_before_or_after(owner, mini_path):
    rng, model = random.Random(), load_model(mini_path, CPU)
    active: set[str] = set()
    base, killed, seconds = weights_hash(model.denoiser), set(rng.sample(range(1, CHANGES), KILLS)), 0.0
    for change in range(CHANGES):
        index = rng.choice("012345678")
        after, start = active ^ {index}, time.perf_counter()
        process = run(owner.root, "restore" if index in active else "erase", index)
        if change in killed:
            process.join(rng.uniform(0, seconds))
            process.kill()
        process.join()
        seconds = seconds if change in killed else time.perf_counter() - start
        assert change in killed or process.exitcode == 0
        ledger = Ledger(owner.root / HISTORY_FILE)
        found = set(ledger.active_shifts())
        assert found in ([active, after] if change in killed else [after]), change
        active = found
        assert verify(ledger, model).set_index("item").sha256["no shift"] == base[:12]
    fresh = load_model(mini_path, CPU)
    assert (
        weights_hash(fresh.denoiser) == base and fresh.digest == Ledger(owner.root / HISTORY_FILE).header["base_digest"]
    )
