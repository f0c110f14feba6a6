"""The ledger's state is what its history says, whoever writes, and whenever one is killed; MOVES=100 KILLS=20 is the whole trial."""

import hashlib
import json
import os
import random
import time

import pytest
import torch
from safetensors.torch import load_file

from ldm.config.concepts import get_concept
from ldm.ledger.ledger import HISTORY_FILE, Ledger, make_header
from ldm.ledger.operations import verify, weights_hash
from ldm.diffusion.load import load_model
from ldm.erasure.merge import applied
from ldm.erasure.shift import SeparableShift

from conftest import CPU, is_error, start_script

LEDGER = "train-scripts/ledger.py"
MOVES, KILLS = int(os.environ.get("MOVES", 12)), int(os.environ.get("KILLS", 3))


@pytest.fixture
def ledger(tiny, tmp_path):
    """One of nine styles with a shift for each in a file."""
    for index in range(9):
        SeparableShift({"a": torch.full((2, 1), float(index))}, torch.ones(1, 3), 1.0).save(tmp_path / f"{index}.safetensors", {})
    return Ledger.create(tmp_path / HISTORY_FILE, make_header(tiny, "style", [get_concept("style", index) for index in range(9)], ["a cat"], {}))


def entry(index: int) -> dict:
    return {"concept": get_concept("style", index).name, "method": "SRS-ME", "shift": f"{index}.safetensors"}


def test_the_state_is_what_the_moves_made_at_every_line(ledger):
    rng, on, states = random.Random(0), set(), [set()]
    for _ in range(30):
        moved = set(rng.sample(range(9), rng.randint(1, 3)))
        ledger.append({index: entry(index) for index in moved - on}, moved & on)
        on = on ^ moved
        states.append(on)
    for known in (ledger, Ledger(ledger.path)):
        assert [set(known.state(number)) for number in range(31)] == states and set(known.state()) == on
        assert list(known.state()) == sorted(on) and list(known.shifts()) == [str(index) for index in sorted(on)]
    assert len(ledger.history_lines()) == 31 and ledger.prompts[:4] == ["", "watermark SRS-ME", "CCS 2024", "a cat"]


def test_what_is_erased_is_not_erased_again_and_a_shift_is_made_once(ledger):
    one, two = get_concept("style", 1), get_concept("style", 2)
    assert ledger.plan_erasure([one, two, one], False) == ({}, [one, two])
    ledger.append({1: entry(1)})
    assert ledger.plan_erasure([one, two], False) == ({}, [two])
    with pytest.raises(ValueError, match="VanGogh is erased already"):
        ledger.plan_erasure([one], True)
    for change in (({1: entry(1)}, []), ({}, [2])):
        before = ledger.path.read_bytes()
        with pytest.raises(ValueError):
            ledger.append(*change)
        assert ledger.path.read_bytes() == before
    ledger.append({}, [1])
    again, new = ledger.plan_erasure([one], False)
    assert list(again) == [1] and not new and ledger.plan_erasure([one], True) == ({}, [one])


@pytest.mark.parametrize("line", range(4))
def test_no_line_can_be_changed_dropped_or_doubled_unseen(ledger, line):
    for index in range(3):
        ledger.append({index: entry(index)})
    lines = ledger.path.read_text().splitlines(keepends=True)
    kept, tampered = lines[:], [lines[:line] + [lines[line]] * 2 + lines[line + 1:]]
    if line < 3:  # of the last line none knows but its owner: verify prints its digest
        tampered += [lines[:line] + lines[line + 1:], lines[:line] + [lines[line].replace('"time": "2', '"time": "3')] + lines[line + 1:]]
    for wrong in [*tampered, lines[:line] + ["{}\n"] + lines[line + 1:], lines[:line] + ["\x00\n"]]:
        ledger.path.write_text("".join(wrong))
        with pytest.raises(ValueError, match="is not what was written there"):
            Ledger(ledger.path)
    ledger.path.write_text("".join(kept))
    assert Ledger(ledger.path).head == ledger.head


@pytest.mark.parametrize("line, wrong", [
    (0, {"concepts": [99]}), (0, {"erase_cat": "x"}), (0, {"protected": [3]}), (0, {"base": None}), (1, {"erase": {"77": entry(1)}}),
    (1, {"erase": {"1": entry(1) | {"shift": "../../1.safetensors"}}}), (1, {"erase": {"1": entry(1) | {"digest": 5}}}),
    (1, {"erase": {"1": "x"}}), (1, {"restore": [3]}), (1, {"restore": 3}), (1, {"time": 3})])
def test_a_history_that_was_made_up_is_refused(ledger, line, wrong):
    ledger.append({1: entry(1)})
    lines, before = [], ""
    for number, text in enumerate(ledger.path.read_text().splitlines()):  # with digests that fit
        lines.append(json.dumps(json.loads(text) | {"before": before} | (wrong if number == line else {})))
        before = hashlib.sha256(lines[-1].encode()).hexdigest()
    ledger.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"line {line + 1}, is not what was written there"):
        Ledger(ledger.path)


def test_another_file_in_a_shifts_place_is_refused(ledger, tmp_path):
    ledger.append({1: entry(1)})
    (tmp_path / "1.safetensors").write_bytes((tmp_path / "2.safetensors").read_bytes())
    for refuses in (ledger.shifts, lambda: ledger.load(ledger.last_shift(1))):
        with pytest.raises(ValueError, match="not the file that was switched on"):
            refuses()
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(ValueError, match="missing"):
        ledger.shifts()


@pytest.fixture
def desk(script, mini_path, tmp_path):
    """A ledger of the nine styles of a tiny model, and what runs its commands."""
    root = tmp_path / "desk"
    given = {"init": ["--model", mini_path, "--device", "cpu", "--protect", "a cat"], "verify": ["--device", "cpu"],
             "erase": ["--device", "cpu"], "export": ["--device", "cpu"]}

    def run(command, *arguments):
        return script(LEDGER, command, *arguments, "--root", root, *given.get(command, []))
    run.root = root
    assert run("init")[0] == 0
    return run


def test_erase_restore_status_history_verify_and_export(desk, mini_path):
    assert desk("erase", "Van Gogh", "2")[0] == 0 and desk("restore", "picasso")[0] == 0
    made = {path: path.read_bytes() for path in desk.root.rglob("*.safetensors")}
    out = desk("erase", "PICASSO")[1]
    assert {path: path.read_bytes() for path in desk.root.rglob("*.safetensors")} == made  # the shift of then
    rows = {row.split(" | ")[1]: row for row in out.splitlines()}
    assert "| erased | SRS-ME |" in rows["Picasso"] and "| untouched |" in rows["Cezanne"] and "VanGogh" in desk("history")[1]
    assert desk("erase", "VanGogh")[0] == 0 and len(Ledger(desk.root / HISTORY_FILE).entries) == 3  # nothing to do
    base = load_model(mini_path, CPU)
    ledger, model = Ledger(desk.root / HISTORY_FILE), load_model(mini_path, CPU)
    proved = verify(ledger, model).set_index("what").digest
    with applied(model.unet, list(ledger.shifts().values())):
        assert proved["2 shifts merged"] == weights_hash(model.unet)[:12]
    assert proved["no shift"] == weights_hash(base.unet)[:12] and desk("verify")[0] == 0
    assert desk("export", "--format", "unet")[0] == 0
    written = load_file(desk.root / "export" / f"{base.name}-12-unet" / "diffusion_pytorch_model.safetensors")
    lines = [json.loads(line) for line in (desk.root / HISTORY_FILE).read_text().splitlines()]
    on = {}
    for line in lines[1:]:  # from the history alone, by other means
        on = {index: shift for index, shift in (on | line["erase"]).items() if int(index) not in line["restore"]}
    for name, weight in base.unet.state_dict().items():
        total = weight.double()
        for shift in on.values():
            tensors = load_file(desk.root / shift["shift"])
            if (own := f"w.{name.removesuffix('.weight')}") in tensors:
                total = total + tensors[own].double() @ (ledger.shifts()["1"].scale * tensors["directions"])
        assert torch.equal(written[name], total.float())


def test_what_a_ledger_refuses(desk, script, other_path, tmp_path):
    is_error(desk("init"), "has a ledger already", "--root")
    is_error(desk("erase", "Matisse"), "'Matisse' is no concept of this ledger", "VanGogh")
    is_error(desk("erase", "../../etc"), "no concept")
    is_error(desk("export"), "nothing is erased")
    is_error(desk("erase", "1", "--method", "FMN", "--ridge", "1"), "--ridge is no setting of FMN")
    is_error(script(LEDGER, "status", "--root", tmp_path / "none"), "no ledger in", "ledger.py init")
    assert desk("erase", "1")[0] == 0
    is_error(desk("erase", "1", "--ridge", "1"), "erased already", "restore it first")
    is_error(script(LEDGER, "verify", "--root", desk.root, "--model", other_path, "--device", "cpu"), "another base model")
    assert len(Ledger(desk.root / HISTORY_FILE).entries) == 1


def run(root, command: str, *names: str):
    return start_script([LEDGER, command, *names, "--root", root, *(["--device", "cpu"] if command == "erase" else [])], root / f"{os.urandom(4).hex()}.log")


def test_several_owners_at_once_lose_no_change(desk):
    processes = [run(desk.root, "erase", str(index)) for index in range(4)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    ledger = Ledger(desk.root / HISTORY_FILE)
    assert set(ledger.state()) == {0, 1, 2, 3} and len(ledger.entries) == 4
    processes = [run(desk.root, "restore", str(index)) for index in range(4)] + [run(desk.root, "erase", "5")]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 5 and set(Ledger(desk.root / HISTORY_FILE).state()) == {5}


def test_random_moves_with_kills_leave_the_state_before_or_after(desk, mini_path):
    rng, model, on = random.Random(), load_model(mini_path, CPU), set()
    base, killed, seconds = weights_hash(model.unet), set(rng.sample(range(1, MOVES), KILLS)), 0.0
    for move in range(MOVES):
        index = rng.randrange(9)
        after, begin = on ^ {index}, time.perf_counter()
        process = run(desk.root, "restore" if index in on else "erase", str(index))
        if move in killed:
            process.join(rng.uniform(0, seconds))
            process.kill()
        process.join()
        seconds = seconds if move in killed else time.perf_counter() - begin
        assert move in killed or process.exitcode == 0
        ledger = Ledger(desk.root / HISTORY_FILE)
        assert set(ledger.state()) in ([on, after] if move in killed else [after]), move
        on, proved = set(ledger.state()), verify(ledger, model).set_index("what").digest
        assert proved["no shift"] == base[:12]
    fresh = load_model(mini_path, CPU)
    assert weights_hash(fresh.unet) == base and fresh.digest == Ledger(desk.root / HISTORY_FILE).header["base_digest"]
