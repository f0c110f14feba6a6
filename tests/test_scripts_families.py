"""Scripts of the evaluation on a model that is no Stable Diffusion: what they leave out, refuse and measure."""

from types import SimpleNamespace

import pytest
from conftest import CPU, is_error
from families import make_family

from ldm.cli.experiment import trainable_methods
from ldm.config.methods import METHODS
from ldm.diffusion.load import load_model
from ldm.io.errors import Notice

FEW = ["--seeds_per_prompt", "1", "--num_inference_steps", "1"]
GATES = ["--num_captions", "20", "--retain_captions", "20", "--retain_words", "10"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_family("flux", tmp_path_factory.mktemp("models") / "flux")


@pytest.mark.parametrize("name", ["scenes", "compare-methods"])
def test_a_method_that_cannot_train_it_is_refused_before_any_work(script, path, tmp_path, name):
    flags = ["--model", path, "--save_path", tmp_path / "out", *FEW]
    found = script(f"eval-scripts/{name}.py", *flags, "--methods", "SRS-ME,FMN")
    is_error(found, "FMN changes cross-attention, which FluxTransformer2DModel does not have: choose SRS-ME or ESD")
    assert not list((tmp_path / "out").rglob("*.safetensors")) and not list((tmp_path / "out").rglob("*.png"))


def test_of_the_methods_that_nobody_typed_the_others_run(path, monkeypatch):
    experiment, configs = SimpleNamespace(model=load_model(path, CPU)), {name: kind() for name, kind in METHODS.items()}
    monkeypatch.setattr("ldm.cli.arguments.typed", {})
    with pytest.warns(Notice, match="without (FMN|AbConcept): .* changes cross-attention"):
        found = trainable_methods(experiment, list(METHODS), configs)
    assert found == ["SRS-ME", "SRS-ME-dagger", "SRS-ME-double-dagger", "ESD"]


@pytest.mark.parametrize("name", ["regularisation", "threshold", "beta", "protected", "similar", "init"])
def test_no_ablation_is_of_gates(script, path, name):
    found = script(f"eval-scripts/ablate-{name}.py", "--model", path, "--form", "gated")
    is_error(found, "--form gated: what is compared here decides the change of weights, and no gate: leave it out")


def test_gates_of_two_text_encoders_and_streams_are_measured(script, path, tmp_path):
    (tmp_path / "names.csv").write_text("name,kind,aliases\nVanGogh,style,\nPicasso,style,\n")
    flags = ["--model", path, "--concepts", tmp_path / "names.csv", "--restored", "Picasso", *GATES]
    code, _, err = script("eval-scripts/evaluate-gates.py", *flags, "--save_path", tmp_path / "gates")
    assert code == 0, err
    assert (tmp_path / "gates" / "gates.csv").is_file()
