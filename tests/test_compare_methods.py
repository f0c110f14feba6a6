"""All methods side by side: who takes part, on which prompts, and what the tables say of a run."""

import pandas as pd
import pytest

from ldm.config.concepts import erasable_concepts, match_concept
from ldm.config.methods import METHODS, SRSMEConfig
from ldm.config.models import bundled_config
from ldm.experiments.methods import (
    CHANGED,
    LEFT,
    MethodComparison,
    list_contenders,
    prompt_groups,
    summarize,
    summary_markdown,
)

ERASED = [0, 1, 3, 4, 5, 6, 7, 8]


def test_every_method_takes_part_and_srs_me_in_all_its_forms():
    configs = bundled_config("mini-sd-minilm").methods
    contenders = list_contenders(list(METHODS), configs, [0.5, 2.0])
    assert len({contender.name for contender in contenders}) == len(contenders) == 5 + len(METHODS) - 1
    by_name = {contender.name: contender for contender in contenders}
    assert by_name["SRS-ME gated"].form == "gated"
    assert all(contender.form == "linear" for name, contender in by_name.items() if name != "SRS-ME gated")
    half, twice = (by_name[f"SRS-ME linear {factor}"].config for factor in ("0.5", "2"))
    assert isinstance(half, SRSMEConfig) and isinstance(twice, SRSMEConfig)
    assert twice.captions_preserve_scale == 4 * half.captions_preserve_scale > 0
    assert by_name["SRS-ME trained"].config.trains and not half.trains
    words_alone = by_name["SRS-ME linear, words alone"].config
    assert isinstance(words_alone, SRSMEConfig) and words_alone.vocab_preserve_scale > 0
    assert not words_alone.captions_preserve_scale and words_alone.anchor == "empty"


@pytest.mark.parametrize(("category", "erased"), [("style", ERASED), ("object", [0, 1, 2]), ("logo", [3])])
def test_prompts_that_should_stay_say_nothing_that_is_erased(category, erased):
    groups = prompt_groups(category, erased, 2)
    assert set(groups) <= {*LEFT, *CHANGED} and {"names", "restored", "captions", "protected"} <= set(groups)
    for name, prompts in groups.items():
        concepts = [match_concept(category, prompt) for prompt in prompts]
        said = [concept is not None and concept.index in erased for concept in concepts]
        assert all(said) if name in LEFT else not any(said), name
    number = len(erasable_concepts(category)) * 2
    assert len(groups["captions"]) == len(groups["words"]) == number


def rows(contender, line, **values):
    constants = {"seconds": 1.0, "max_abs_diff": 0.0, "psnr": 40.0, "images": 2}
    table = []
    for group, (accuracy, shown, lpips, unchanged) in values.items():
        measured = {"accuracy_after": accuracy, "shown": shown, "lpips": lpips, "unchanged": unchanged}
        names = {"contender": contender, "line": line, "group": group.replace("_", " ")}
        table.append({**names, "prompt": group, **constants, **measured})
    return pd.DataFrame(table)


def test_a_summary_has_what_is_left_and_what_becomes_of_the_rest():
    nan = float("nan")
    table = pd.concat(
        [
            rows(
                "original",
                "original",
                names=(100.0, nan, 0.0, 1.0),
                erased_compositions=(100.0, 10.0, 0.0, 1.0),
                restored=(100.0, nan, 0.0, 1.0),
            ),
            rows(
                "FMN",
                "FMN",
                names=(20.0, nan, 0.5, 0.0),
                erased_compositions=(40.0, 60.0, 0.5, 0.0),
                restored=(90.0, nan, 0.3, 0.25),
            ),
        ]
    )
    summary = summarize(table).set_index("contender")
    assert list(summary.index) == ["original", "FMN"]
    assert summary.left["FMN"] == 30.0 and summary.shown["FMN"] == 60.0 and summary.left["original"] == 100.0
    assert summary["restored LPIPS"]["FMN"] == 0.3 and summary["restored unchanged"]["FMN"] == 0.25
    text = summary_markdown(summary.reset_index())
    assert "0.300 / 25 %" in text and "| 20 | 40 | 60 | 90 |" in text and "nan" not in text


class StillExperiment:
    """An experiment that generates nothing and notes what it was asked for."""

    category, seed, seeds_per_prompt = "style", 0, 1


def test_a_prompt_of_two_groups_counts_in_the_first(tmp_path):
    groups = {"names": ["VanGogh"], "captions": ["VanGogh", "a dog"]}
    comparison = MethodComparison(StillExperiment(), tmp_path, [1], groups, None)  # type: ignore[arg-type]
    assert comparison.groups == {"VanGogh": "names", "a dog": "captions"}
