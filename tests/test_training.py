import itertools

import pytest
import torch

from ldm.erasure.losses import LossOutput
from ldm.erasure.training import MomentumStopping, TrainStep, fit, training_loop


def quadratic(weight):
    return lambda latents, step: LossOutput((weight - 3).square().sum(), weight.detach().sum())


def test_it_minimises_and_yields_what_it_saw_before_each_update():
    weight = torch.zeros(1, requires_grad=True)
    steps = list(itertools.islice(training_loop(quadratic(weight), [weight], itertools.repeat((None, None)), 0.5), 40))
    assert steps[0] == TrainStep(1, 9.0, 0.0) and abs(weight.item() - 3) < 0.5


def test_a_loss_of_nan_stops_before_the_weights_are_touched():
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(FloatingPointError, match="step 1.*nothing was saved"):
        next(training_loop(lambda *_: LossOutput(weight.sum() * float("nan"), weight.sum()), [weight], [(None, None)], 0.5))
    assert weight.item() == 1


def test_a_gradient_of_infinity_stops_before_the_weights_are_touched():
    weight = torch.zeros(1, requires_grad=True)
    with pytest.raises(FloatingPointError, match="gradient's norm inf"):
        next(training_loop(lambda *_: LossOutput(weight.sqrt().sum(), weight.sum()), [weight], [(None, None)], 0.5))
    assert weight.item() == 0


def test_the_momentum_starts_at_the_first_value_and_waits_for_ten_steps():
    stop = MomentumStopping(threshold=0.5)
    assert [stop.update(TrainStep(n, 0, 0.0)) for n in range(1, 11)] == [False] * 9 + [True]
    stop = MomentumStopping(threshold=0.5)
    stop.update(TrainStep(1, 0, 1.0))
    stop.update(TrainStep(2, 0, 0.0))
    assert stop.momentum == pytest.approx(0.9)


class Falling:
    """A quadratic whose watched value is its parameter."""

    def __init__(self):
        self.weight = torch.ones(1, requires_grad=True)

    def parameters(self):
        return [self.weight]

    def __call__(self, latents, step):
        return LossOutput((self.weight + 3).square().sum(), self.weight.detach().sum())


def test_learning_stops_at_the_threshold_or_after_the_last_step(capsys):
    curve = fit(Falling(), itertools.repeat((None, None)), 0.3, 50, 0.0, "x")
    assert 10 <= len(curve) < 50 and curve.momentum.iloc[-1] <= 0 < curve.momentum.iloc[-2]
    assert "not reached" not in capsys.readouterr().out
    assert len(fit(Falling(), itertools.repeat((None, None)), 0.3, 7, 0.0, "x")) == 7
    assert "x: --threshold 0.0 was not reached" in capsys.readouterr().out
    assert len(fit(Falling(), itertools.repeat((None, None)), 0.3, 50, None, "x")) == 50
    assert "not reached" not in capsys.readouterr().out
