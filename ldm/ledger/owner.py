"""What a ledger's owner may do on the live page: erase and restore for good, as the ledger's own commands do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm.config.methods import NO_GATE, SRSMEConfig
from ldm.config.models import load_model_config
from ldm.ledger.demo import DemoSession
from ldm.ledger.demo_state import RequestError
from ldm.ledger.history import ledger_lock
from ldm.ledger.ledger import Ledger
from ldm.ledger.operations import create_shifts

ACTIONS = ("erase", "restore")


@dataclass(frozen=True)
class Owner:
    """Writes to the ledger of a live page. `image_dir` has images per concept, for a method that trains on them."""

    demo: DemoSession
    image_dir: Path

    def check(self, action: str, name: str) -> None:
        """Raise RequestError where a concept cannot be erased or restored as the ledger stands."""
        state = self.demo.reload()
        state.concept(name)
        if action not in ACTIONS:
            raise RequestError(f"a concept can be erased or restored: choose {' or '.join(ACTIONS)}")
        if action == "erase" and name in state.erased:
            raise RequestError(f"{name} is erased already")
        if action == "restore" and name not in state.erased:
            raise RequestError(f"{name} is not erased, and cannot be restored")

    def foretell(self, action: str, name: str) -> str:
        """Return what an action would do. Raises RequestError as `check`."""
        self.check(action, name)
        if action == "restore":
            return f"Restore {name}: every visitor's page starts with {name} restored from its next load."
        shift = (
            "the shift that erased it before" if name in self.demo.state.shifts else "a new shift, which takes a while"
        )
        return f"Erase {name} by {shift}: every visitor's page starts without {name} from its next load."

    def write(self, action: str, name: str) -> None:
        """Erase or restore a concept in the ledger, and show the ledger as it is then.

        Raises RequestError as `check`, and for what a concept cannot be erased by.
        """
        root = self.demo.state.ledger.root
        with ledger_lock(root):
            self.check(action, name)
            try:
                if action == "erase":
                    self._erase(name)
                else:
                    self._restore(name)
            except ValueError as error:
                raise RequestError(f"nothing was written: {error}") from error
        self.demo.reload()

    def _erase(self, name: str) -> None:
        """Activate a concept's last shift, or a new one that is made by a model of its own."""
        ledger = Ledger(self.demo.state.ledger.path)
        records, missing = ledger.plan_erasure([self.demo.state.concept(name)], False)
        if missing:
            with self.demo.fresh_model() as model:
                config = load_model_config(model)
                gate = config.gate if self.demo.form == "gated" else NO_GATE
                settings = config.methods[SRSMEConfig.name], config.null_space, self.image_dir, gate
                records |= create_shifts(ledger, model, missing, *settings)
        if not records:
            raise ValueError(f"no gate was found for {name}: erase it another way")
        ledger.append(records)

    def _restore(self, name: str) -> None:
        """Deactivate a concept's shift."""
        ledger = Ledger(self.demo.state.ledger.path)
        active = ledger.active_shifts()
        ledger.append({}, [key for key, record in active.items() if record["concept"] == name])
