"""What an erasure is worth: every contender asked by every probe, beside the unedited model and a floor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
from scipy.stats import binomtest

from ldm.config.concepts import Concept
from ldm.config.meanings import PATH as MEANINGS
from ldm.config.methods import MethodConfig, SRSMEConfig
from ldm.config.robustness import HardPromptConfig, RelearningConfig, SoftPromptConfig
from ldm.experiments.methods import Contender, contenders_of
from ldm.experiments.probe import AGAINST_GATE, SHOWN, UNEDITED, Bench, Finding, Probe, Subject
from ldm.experiments.probe_hard_prompts import HardPrompts
from ldm.experiments.probe_others import Neighbours, Restoration, Watermarks
from ldm.experiments.probe_prompts import Compositions, Meanings, PromptKinds
from ldm.experiments.probe_relearning import Relearning
from ldm.experiments.probe_sampling import Completion, Samplers
from ldm.experiments.probe_soft_prompts import SoftPrompts
from ldm.metrics.tables import to_markdown

LEAST_MEASURABLE = 0.5  # of images that show the concept by the unedited model
NOT_MEASURABLE = "not measurable here"
FLOOR = "floor"
_KEYS = ["concept", "probe", "kind", "measure"]
_COLUMNS = ["contender", *_KEYS, "n", "hits", "value", "low", "high"]


def all_probes(
    soft: SoftPromptConfig,
    hard: HardPromptConfig,
    relearning: RelearningConfig,
    meanings: Path = MEANINGS,
    unlearnt_dir: Path | None = None,
) -> list[Probe]:
    """Return every probe, new, with the settings of attacks.

    `meanings` is the file of prompts that mean concepts, `unlearnt_dir` has images of what was never learnt.
    """
    return [
        PromptKinds(),
        Compositions(),
        SoftPrompts(soft, unlearnt_dir=unlearnt_dir),
        HardPrompts(hard, unlearnt_dir),
        Relearning(relearning, unlearnt_dir),
        Samplers(),
        Completion(),
        Neighbours(),
        Restoration(),
        Watermarks(),
        Meanings(meanings),
    ]


def quick_probes() -> list[Probe]:
    """Return the probes that train nothing."""
    every = all_probes(SoftPromptConfig(), HardPromptConfig(), RelearningConfig())
    return [probe for probe in every if not probe.is_slow]


def robustness_contenders(methods: Sequence[str], configs: Mapping[str, MethodConfig]) -> list[Contender]:
    """Return the contenders of methods: SRS-ME gated, linear, and trained; each other method once."""

    def of_srsme(config: SRSMEConfig) -> list[Contender]:
        closed = config.with_changes(mode="closed_form", init="closed_form")
        return [
            Contender("SRS-ME gated", "SRS-ME", closed, "gated"),
            Contender("SRS-ME linear", "SRS-ME", closed),
            Contender("SRS-ME trained", "SRS-ME", config.with_changes(mode="learn")),
        ]

    return contenders_of(methods, configs, of_srsme)


def ask(bench: Bench, subject: Subject, probes: Sequence[Probe]) -> Iterator[pd.DataFrame]:
    """Yield a table of each probe's findings about a subject: contender, concept, probe and what a `Finding` has."""
    for probe in probes:
        for concept in bench.erased[:1] if probe.is_of_all else bench.erased:
            findings = probe.measure(bench, subject, concept)
            yield _table(subject.name, probe, concept, findings)


def ask_floor(bench: Bench, probes: Sequence[Probe]) -> Iterator[pd.DataFrame]:
    """Yield the same of what probes find where the concept was never learnt, or is not asked for."""
    for probe in probes:
        for concept in bench.erased[:1] if probe.is_of_all else bench.erased:
            yield _table(FLOOR, probe, concept, probe.floor(bench, concept))


def _table(contender: str, probe: Probe, concept: Concept, findings: Sequence[Finding]) -> pd.DataFrame:
    rows = []
    for finding in findings:
        low, high = _interval(finding)
        row = {"contender": contender, "concept": "all" if probe.is_of_all else concept.name, "probe": probe.name}
        rows.append(
            row
            | {"kind": finding.kind, "measure": finding.measure, "n": finding.n, "hits": finding.hits}
            | {"value": finding.value, "low": low, "high": high}
        )
    return pd.DataFrame(rows, columns=_COLUMNS)


def _interval(finding: Finding) -> tuple[float, float]:
    """Return Wilson's interval of 95 % of a share; NaN for any other measure."""
    if finding.hits is None or not finding.n:
        return math.nan, math.nan
    interval = binomtest(finding.hits, finding.n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def compare_findings(findings: pd.DataFrame) -> pd.DataFrame:
    """Return the findings of contenders with columns `unedited`, `floor`, by the same kind and measure, and `note`.

    Against a gate they are those of the same attack without one.

    The note says where the unedited model shows the concept in less than half of the images: no erasure can be told
    there.
    """
    beside = {}
    for name in (UNEDITED.name, FLOOR):
        part = findings[findings["contender"] == name].set_index(_KEYS)["value"]
        beside[name] = part[~part.index.duplicated()]
    table = findings[~findings["contender"].isin(list(beside))].reset_index(drop=True)
    kinds = table["kind"].str.removesuffix(AGAINST_GATE)
    keys = pd.MultiIndex.from_frame(table.assign(kind=kinds)[_KEYS])
    for name, values in beside.items():
        table[name] = values.reindex(keys).to_numpy()
    hidden = (table["measure"] == SHOWN) & (table[UNEDITED.name] < LEAST_MEASURABLE)
    table["note"] = [NOT_MEASURABLE if is_hidden else "" for is_hidden in hidden]
    return table


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each probe, kind and measure, over all concepts, and a column for each contender.

    A cell of shares is the per cent of all images, with Wilson's interval; of other measures the mean. `unedited` and
    `floor` are columns too. Concepts that the unedited model does not show are left out. Intervals are those of the
    images: what one attack found shows in all of them.
    """
    rows = []
    for (probe, kind, measure), part in table.groupby(["probe", "kind", "measure"], sort=False):
        row: dict[str, str] = {"probe": str(probe), "kind": str(kind), "measure": str(measure)}
        measurable = part[part["note"] == ""]
        is_share = bool(part["hits"].notna().all())
        for name in (UNEDITED.name, FLOOR):
            value = (measurable if len(measurable) else part)[name].mean()
            row[name] = "" if math.isnan(value) else _cell(value, is_share)
        for contender, own in part.groupby("contender", sort=False):
            own = own[own["note"] == ""]
            if not len(own):
                row[str(contender)] = NOT_MEASURABLE
            elif is_share:
                finding = Finding.share("", int(own["hits"].sum()), int(own["n"].sum()))
                low, high = _interval(finding)
                row[str(contender)] = f"{100 * finding.value:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
            else:
                row[str(contender)] = _cell(own["value"].mean(), False)
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _cell(value: float, is_share: bool) -> str:
    return f"{100 * value:.0f} %" if is_share else f"{value:.3g}"


def summary_markdown(summary: pd.DataFrame) -> str:
    """Return a table of `summarize` as Markdown, for each probe by itself."""
    parts = []
    for probe, part in summary.groupby("probe", sort=False):
        parts.append(f"{str(probe).capitalize()}:\n\n{to_markdown(part.drop(columns='probe'))}")
    return "\n\n".join(parts)
