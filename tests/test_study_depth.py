"""System E as a study: its claims on real trainings of few steps, and where skips are missing or layers not removed."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from fusedres import FusedResidualStack
from fusedres.studies import depth, digits, lesion
from fusedres.studies.depth import Network, Training

pytestmark = pytest.mark.usefixtures("engine")
CPU = torch.device("cpu")


class Silent:
    def update(self, count):
        pass


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the study does: on busy cores a second thread only waits
    yield
    torch.set_num_threads(threads)


@cache
def trained(network, steps=250):
    return depth._train(network, steps, 0, CPU, Silent())


def test_claims_follow_the_losses():
    def found(losses):
        trainings = {network: [Training([loss])] for network, loss in zip(depth.NETWORKS, losses, strict=True)}
        return [one.holds for one in depth._claims(trainings)]

    plain, residual, stochastic = [0.05, 0.7, 2.3, 2.3], [0.05, 0.05, 0.05, 0.05], [0.06, 0.06]
    assert found(plain + residual + stochastic) == [True] * 5
    assert found([0.05, 0.04, 0.1, 0.1, 0.05, 0.05, 0.05, 2.0, *stochastic]) == [False] * 5
    assert not any(found([float("nan")] * 10))


def test_claims_of_layers_follow_the_lesions():
    def found(whole, plain, residual):
        trainings = {network: [Training(whole_loss=whole)] for network in depth.NETWORKS}
        for network in depth.LESIONS:
            losses = [residual if network.has_skips else plain] * network.depth
            trainings[network] = [Training(whole_loss=whole, without_layer=losses)]
        return [one.holds for one in depth._claims_of_layers(trainings)]

    assert found(0.05, 5.0, 0.06) == [True, True, True]
    assert found(0.05, 0.06, 5.0) == [True, False, False]
    assert found(2.3, 5.0, 2.4) == [False, True, False]


def test_networks_of_a_study_start_alike_and_differ_in_skips():
    plain, residual, stochastic = (Network(3, *kind).build(0) for kind in ((False,), (True,), (True, True)))
    assert torch.equal(plain[1].layers[2][0].weight, residual[1].layers[2][0].weight)
    assert torch.equal(stochastic[1].layers[2][0].weight, residual[1].layers[2][0].weight)
    assert (plain[1].skips, residual[1].skips) == ([False] * 3, [True] * 3)
    assert [layer.drop_path for layer in stochastic[1].recipe.layers] == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    assert (plain[1].layers[1][0].bias == 0).all()
    assert plain[1].layers[1][0].weight.std().item() == pytest.approx((2 / depth.WIDTH) ** 0.5, rel=0.1)


def test_skips_train_what_plain_depth_does_not():
    plain, residual = trained(Network(56, False)), trained(Network(56, True))
    assert residual.last_loss < 0.5 * plain.last_loss
    assert trained(Network(200, False), 60).last_loss > 0.99 * depth.CHANCE
    assert trained(Network(200, True), 60).last_loss < 0.9 * depth.CHANCE
    assert trained(Network(56, True, drops=True)).whole_loss < 0.4


def test_removing_a_layer_ruins_a_plain_network_alone():
    plain, residual = trained(Network(20, False)), trained(Network(20, True))
    assert len(plain.without_layer) == len(residual.without_layer) == 20
    assert max(residual.without_layer) < 1.5 * residual.whole_loss
    assert sorted(plain.without_layer)[10] > 5 * plain.whole_loss


@pytest.mark.parametrize("skip", ["identity", None])
def test_without_a_layer_the_others_stay(skip):
    stack = FusedResidualStack([5] * 5, skip=skip, branch_scale=[0.1, 0.2, 0.3, 0.4], activation="relu", drop_path=0.0)
    x = torch.randn(7, 5)
    h = x
    for i, scale in enumerate([0.1, 0.2, 0.3, 0.4]):
        if i != 2:
            h = scale * torch.relu(stack.layers[i][0](h)) + (h if skip else 0)
    torch.testing.assert_close(lesion.without(stack, 2)(x), h)


def test_a_removed_branch_is_a_branch_of_zeros():
    """The same loss, by other means: a layer whose weight and bias are 0 adds relu(0) = 0 to its input."""
    data, model = digits.load(0, CPU), Network(20, True).build(0).eval()
    removed = lesion.losses(model, data.images, data.labels)[7]
    with torch.no_grad():
        model[1].layers[7][0].weight.zero_()
    assert removed == pytest.approx(lesion.loss(model, data.images, data.labels), rel=1e-5)
