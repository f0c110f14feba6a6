"""The training loop: it minimises, refuses what is not finite, and stops where it should."""

import itertools

import pytest
import torch

from ldm.config.methods import ForgetMeNotConfig, SRSMEConfig
from ldm.erasure.losses import LossOutput
from ldm.erasure.training import MomentumStopping, TrainStep, fit, training_loop
from ldm.io.errors import Notice

BATCHES = itertools.repeat((None, None))


class WeightLoss:
    """A loss of one weight, by a function of it, whose monitored value is the weight."""

    def __init__(self, start, function):
        self.weight = torch.tensor([start], requires_grad=True)
        self.function = function

    def parameters(self):
        return [self.weight]

    def __call__(self, latents, timestep):
        return LossOutput(self.function(self.weight).sum(), self.weight.detach().sum())


def test_it_minimises_and_yields_what_it_saw_before_each_update():
    loss = WeightLoss(0.0, lambda weight: (weight - 3).square())
    steps = list(itertools.islice(training_loop(loss, BATCHES, 0.5), 40))
    assert steps[0] == TrainStep(1, 9.0, 0.0) and abs(loss.weight.item() - 3) < 0.5


def test_a_loss_of_nan_stops_before_the_weights_are_touched():
    loss = WeightLoss(1.0, lambda weight: weight * float("nan"))
    with pytest.raises(FloatingPointError, match=r"iteration 1.*nothing was saved"):
        next(training_loop(loss, BATCHES, 0.5))
    assert loss.weight.item() == 1


def test_a_gradient_of_infinity_stops_before_the_weights_are_touched():
    loss = WeightLoss(0.0, torch.sqrt)
    with pytest.raises(FloatingPointError, match="gradient's norm inf"):
        next(training_loop(loss, BATCHES, 0.5))
    assert loss.weight.item() == 0


def test_the_momentum_starts_at_the_first_value_and_waits_for_ten_iterations():
    stopping = MomentumStopping(threshold=0.5)
    assert [stopping.update(TrainStep(k, 0, 0.0)) for k in range(1, 11)] == [False] * 9 + [True]
    stopping = MomentumStopping(threshold=0.5)
    stopping.update(TrainStep(1, 0, 1.0))
    stopping.update(TrainStep(2, 0, 0.0))
    assert stopping.momentum == pytest.approx(0.9)


def make_falling():
    """Return a loss whose monitored value falls from 1 below 0."""
    return WeightLoss(1.0, lambda weight: (weight + 3).square())


def test_training_stops_at_the_threshold_or_after_the_last_iteration(recwarn):
    config = SRSMEConfig(lr=0.3, max_steps=50, stop_threshold=0.0)
    curve = fit(make_falling(), BATCHES, config, "x")
    assert 10 <= len(curve) < 50 and curve.momentum.iloc[-1] <= 0 < curve.momentum.iloc[-2]
    assert list(curve) == ["iteration", "loss", "monitor", "momentum"]
    assert not recwarn
    assert len(fit(make_falling(), BATCHES, config.with_changes(max_steps=7), "x")) == 7
    assert "x: the threshold 0.0 was not reached" in str(recwarn.pop(Notice).message)
    without_threshold = ForgetMeNotConfig(lr=0.3, max_steps=50)
    assert len(fit(make_falling(), BATCHES, without_threshold, "x")) == 50
    assert not recwarn
