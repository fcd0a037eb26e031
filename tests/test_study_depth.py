"""System E as a study: its claims on real trainings of few steps, and where skips are missing or layers not removed."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from fusedres import FusedResidualStack
from fusedres.studies import depth, depth_claims, digits, lesion
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


def trainings(none=(0.15, 0.16), **losses):
    """By the losses of each kind at 20, 56, 200 and 1000 layers, each a number or one for every seed."""
    found = {depth.NO_LAYERS: [Training([loss]) for loss in none]}
    for networks in (depth.PLAIN, depth.RESIDUAL, depth.STOCHASTIC):
        for network, loss in zip(networks, losses[networks[0].kind], strict=True):
            found[network] = [Training([one]) for one in (loss if isinstance(loss, tuple) else (loss,))]
    return found


AS_SAID = {
    "plain": [(0.05, 0.07), (0.7, 0.9), 2.3, 2.3],
    "residual": [(0.05, 0.06), (0.06, 0.07), 0.06, 0.1],
    "stochastic": [0.06, 0.07, 0.07, 0.12],
}


@pytest.mark.parametrize(
    ("changed", "holds"),
    [
        ({}, [True] * 7),
        ({"plain": [(0.05, 0.8), (0.7, 0.9), 2.3, 2.3]}, [False, True, False, True, True, True, True]),
        ({"plain": [0.05, 0.06, 0.1, 0.1]}, [True, False, False, True, False, True, True]),
        ({"residual": [0.15] * 4}, [True, False, False, False, False, False, True]),
        ({"residual": [0.146] * 4}, [True, False, False, False, False, False, True]),
        ({"residual": [(0.05, 0.155), 0.06, 0.06, 0.1]}, [True, True, False, True, True, False, True]),
        ({"residual": [0.05, 0.06, 0.06, 2.0]}, [True, True, True, False, False, False, True]),
        ({"residual": [0.05, (0.06, float("nan")), 0.06, 0.1]}, [True, False, False, True, True, False, False]),
        ({"none": (0.05, 0.06)}, [True, False, False, False, False, False, True]),
        ({"none": (0.5, float("nan"))}, [True, False, False, False, False, False, False]),
    ],
    ids=[
        "as said",
        "plain seeds overlap",
        "plain trains",
        "a linear classifier",
        "hardly better than one",
        "one seed is a linear classifier",
        "the deepest does not train",
        "one seed is lost",
        "layers are of no use",
        "the baseline is lost",
    ],
)
def test_claims_follow_the_losses(changed, holds):
    assert [one.holds for one in depth_claims.of_depth(trainings(**AS_SAID | changed))] == holds


def test_no_layers_are_compared_after_as_many_steps():
    found = trainings(**AS_SAID)
    found[depth.NO_LAYERS] = [Training([0.5] * 100 + [0.01] * 100)]
    found[Network(1000, True)] = [Training([0.2] * 100)]
    claims = {one.claim[:4]: one.holds for one in depth_claims.of_depth(found)}
    assert claims["1000"]
    found[Network(1000, True)] = [Training([0.2] * 200)]
    assert not {one.claim[:4]: one.holds for one in depth_claims.of_depth(found)}["1000"]


@pytest.mark.parametrize(
    ("loss", "plain", "single", "half", "holds"),
    [
        (0.05, 5.0, 0.06, 0.3, [True] * 4),
        (0.05, 0.06, 5.0, 0.3, [True, False, True, False]),
        (0.05, 5.0, 0.06, 0.06, [True, True, False, True]),
        (0.1, 5.0, 0.1, 0.1, [True, True, False, True]),
        (0.146, 5.0, 0.146, 0.146, [False, False, False, False]),
        (2.3, 5.0, 2.3, 6.9, [False, False, True, False]),
        (0.05, 5.0, float("nan"), 0.3, [True, False, True, True]),
    ],
    ids=[
        "as said",
        "the other way round",
        "half is nothing",
        "nothing does",
        "a linear classifier",
        "untrained",
        "lost",
    ],
)
def test_claims_of_layers_follow_the_lesions(loss, plain, single, half, holds):
    found = trainings(plain=[loss] * 4, residual=[loss] * 4, stochastic=[loss] * 4)
    for network, (training, *_) in found.items():
        if network in depth.LESIONS:
            last = single if network.has_skips else plain
            first = training.whole_loss = loss
            training.without_layer = [first if network.has_skips else plain] * (network.depth - 1) + [last]
            training.halved = [half, 2 * half]
    assert [one.holds for one in depth_claims.of_layers({**found, depth.NO_LAYERS: [Training([0.15])]})] == holds


def test_networks_of_a_study_start_alike_and_differ_in_skips():
    plain, residual, stochastic = (Network(3, *kind).build(0) for kind in ((False,), (True,), (True, True)))
    assert torch.equal(plain[1].layers[2][0].weight, residual[1].layers[2][0].weight)
    assert torch.equal(stochastic[1].layers[2][0].weight, residual[1].layers[2][0].weight)
    assert (plain[1].skips, residual[1].skips) == ([False] * 3, [True] * 3)
    assert [layer.drop_path for layer in stochastic[1].recipe.layers] == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    assert (plain[1].layers[1][0].bias == 0).all()
    assert plain[1].layers[1][0].weight.std().item() == pytest.approx((2 / depth.WIDTH) ** 0.5, rel=0.1)


def test_branches_learn_what_a_linear_classifier_does_not():
    """And not where they count 0: such a network is one."""
    linear = trained(depth.NO_LAYERS).last_loss
    assert trained(Network(20, True)).last_loss < 0.8 * linear
    silent = FusedResidualStack([depth.WIDTH] * 21, activation="relu", skip="identity", branch_scale=0.0)
    h = torch.randn(5, depth.WIDTH)
    assert torch.equal(silent(h), h)


def test_networks_are_those_of_the_issue():
    assert {(one.kind, one.depth) for one in depth.NETWORKS} == {("no layers", 0)} | {
        (kind, layers) for kind in ("plain", "residual", "stochastic") for layers in (20, 56, 200, 1000)
    }
    assert {(one.kind, one.depth) for one in depth.LESIONS} == {("plain", 20)} | {
        (kind, layers) for kind in ("residual", "stochastic") for layers in (20, 56, 200)
    }
    assert str(Network(56, True, drops=True)) == "56 layers, residual, stochastic"


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
    assert min(residual.halved) > 1.5 * residual.whole_loss


@pytest.mark.parametrize("skip", ["identity", None])
def test_without_a_layer_the_others_stay(skip):
    stack = FusedResidualStack([5] * 5, skip=skip, branch_scale=[0.1, 0.2, 0.3, 0.4], activation="relu", drop_path=0.0)
    x = torch.randn(7, 5)
    h = x
    for i, scale in enumerate([0.1, 0.2, 0.3, 0.4]):
        if i != 2:
            h = scale * torch.relu(stack.layers[i][0](h)) + (h if skip else 0)
    model = torch.nn.Sequential(torch.nn.Identity(), stack, torch.nn.Identity())
    torch.testing.assert_close(lesion.Lesions(model).without(2)(x), h)
    h = x
    for i, scale in ((1, 0.2), (3, 0.4)):
        h = scale * torch.relu(stack.layers[i][0](h)) + (h if skip else 0)
    torch.testing.assert_close(lesion.Lesions(model).without(0, 2)(x), h)
    labels = torch.zeros(7, dtype=torch.long)
    halved = lesion.Lesions(model).halved(x, labels)
    assert halved[0] == pytest.approx(torch.nn.functional.cross_entropy(h, labels).item())
    assert halved[1] == pytest.approx(lesion.loss(lesion.Lesions(model).without(1, 3), x, labels))


def test_a_removed_branch_is_a_branch_of_zeros():
    """The same loss, by other means: a layer whose weight and bias are 0 adds relu(0) = 0 to its input."""
    data, model = digits.load(0, CPU), Network(20, True).build(0).eval()
    removed = lesion.Lesions(model).losses(data.images, data.labels)[7]
    with torch.no_grad():
        model[1].layers[7][0].weight.zero_()
    assert removed == pytest.approx(lesion.loss(model, data.images, data.labels), rel=1e-5)
