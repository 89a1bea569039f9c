"""NetworkReward: number formats, offload, and what stays in memory, on a small convolution."""

import pytest
import torch
from torch import nn

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards.networks.network import NetworkReward


class Small(NetworkReward):
    """A network whose layers multiply, so that its slope depends on the picture."""

    name = "small"

    def __init__(self, dtype: str = "float32", offload: bool = False) -> None:
        super().__init__("small", dtype=dtype, offload=offload)
        self.loads = 0

    def load(self) -> nn.Module:
        self.loads += 1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 1, 3))

    def rate(self, network, images, prompts, targets):
        return network(images.to(next(network.parameters()).dtype)).float().mean(dim=(1, 2, 3))


def pictures(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(3, 3, 9, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def scored(reward: Small, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, and the gradient of a sum in which every picture counts differently."""
    total = reward(images, ["a"] * len(images)).total
    (slope,) = torch.autograd.grad((total * torch.arange(1.0, len(images) + 1)).sum(), images)
    return total.detach(), slope


def test_offload_changes_neither_scores_nor_gradient():
    plain, offloaded = scored(Small(), pictures()), scored(Small(offload=True), pictures())
    torch.testing.assert_close(offloaded[0], plain[0], rtol=0, atol=0)
    torch.testing.assert_close(offloaded[1], plain[1], rtol=1e-6, atol=1e-9)


def operations(scores: torch.Tensor) -> set[str]:
    """The names of all operations in the graph behind some scores."""
    names, waiting = set(), [scores.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [before for before, _ in node.next_functions]
    return names


def test_offload_leaves_no_network_in_the_graph():
    plain, offloaded = (Small(offload=offload)(pictures(), ["a"] * 3).total for offload in (False, True))
    assert "ConvolutionBackward0" in operations(plain)
    assert not operations(offloaded) & {"ConvolutionBackward0", "GeluBackward0"}


def test_an_offloaded_network_is_in_main_memory_also_after_a_failure():
    class Failing(Small):
        def rate(self, network, images, prompts, targets):
            raise ValueError("boom")

    reward = Failing(offload=True)
    with pytest.raises(ValueError, match="boom"):
        reward(pictures(), ["a"] * 3)
    assert next(reward._network.parameters()).device.type == "cpu"


def test_a_judge_needs_no_graph():
    for offload in (False, True):
        assert not Small(offload=offload)(pictures().detach(), ["a"] * 3).total.requires_grad


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_half_precision_is_near(dtype, tolerance):
    exact, half = scored(Small(), pictures()), scored(Small(dtype=dtype), pictures())
    torch.testing.assert_close(half[0], exact[0], rtol=0, atol=tolerance)
    assert torch.nn.functional.cosine_similarity(half[1].flatten(), exact[1].flatten(), dim=0) > 0.999


def test_double_images_are_scored_in_double_whatever_the_format():
    reward = Small(dtype="bfloat16")
    reward(pictures(torch.float64), ["a"] * 3)
    assert next(reward._network.parameters()).dtype == torch.float64


def test_the_network_is_loaded_once_and_frozen():
    reward = Small()
    scored(reward, pictures())
    scored(reward, pictures())
    assert reward.loads == 1
    assert not reward._network.training
    assert not any(weight.requires_grad for weight in reward._network.parameters())


def test_one_loaded_in_inference_mode_is_loaded_again_for_training():
    reward = Small()
    with torch.inference_mode():
        reward(pictures().detach(), ["a"] * 3)
    scored(reward, pictures())
    assert reward.loads == 2


def test_an_unknown_format_is_refused():
    with pytest.raises(RewardError, match=r"small\(dtype='int8'\): one of float32, bfloat16, float16"):
        Small(dtype="int8")


def test_the_arguments_are_its_text():
    assert str(Small(dtype="bfloat16", offload=True)) == 'small(dtype="bfloat16", offload=True)'
