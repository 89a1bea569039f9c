"""Stage 3: the judge, a small ResNet that names subject, count and background. No training uses it as a reward."""

import sys

import numpy as np
import torch
from common import SEED, WORK, HalfPrecisionTrainer, pixels, save_preprocessing, train
from render import ATTRIBUTES, SIZE, batch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ResNetConfig, ResNetForImageClassification
from views import augment, decoded

STEPS, BATCH, PEAK, POOL = 1800, 64, 3e-3, 4000
NAMES = [f"{group}:{name}" for group, names in ATTRIBUTES.items() for name in names]
SIZES = [len(names) for names in ATTRIBUTES.values()]
OWN = SEED + 7_000  # no picture or first weight is shared with another stage


def judge() -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128],
            depths=[1, 1, 1],
            layer_type="basic",
            id2label=dict(enumerate(NAMES)),
            label2id={name: i for i, name in enumerate(NAMES)},
        )
    )


def verdicts(logits: Tensor) -> Tensor:
    """The likeliest subject, count and background, int [n, 3]."""
    return torch.stack([group.argmax(dim=1) for group in logits.split(SIZES, dim=1)], dim=1)


@torch.no_grad()
def settle_statistics(network: nn.Module, views: list[Tensor]) -> None:
    """The averaged weights need BatchNorm statistics of their own: the plain mean over many batches."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    network.train()
    for images in views:
        network(images)
    network.eval()


def main() -> None:
    torch.manual_seed(OWN)
    network = judge().to(memory_format=torch.channels_last)
    trainer = HalfPrecisionTrainer([(network, 1.0)], PEAK, average=0.995)
    part = batch(POOL, OWN, 1)
    pool, pool_labels = decoded(part.images, torch.Generator().manual_seed(OWN)), torch.from_numpy(part.labels)

    def views(step: int) -> tuple[Tensor, Tensor]:
        """Half freshly drawn, half decoded; everything augmented."""
        drawn = batch(BATCH // 2, OWN, 2, step)
        chosen = torch.from_numpy(np.random.default_rng((OWN, 3, step)).integers(0, POOL, BATCH // 2))
        images = torch.cat([pixels(drawn.images), pool[chosen].float() / 255])
        labels = torch.cat([torch.from_numpy(drawn.labels), pool_labels[chosen]])
        return augment(images, torch.Generator().manual_seed(OWN * 10**4 + step)) * 2 - 1, labels

    def loss_at(step: int) -> Tensor:
        images, labels = views(step)
        groups = network(images).logits.split(SIZES, dim=1)
        return torch.stack([cross_entropy(group, labels[:, i]) for i, group in enumerate(groups)]).sum()

    network.train()
    train(trainer, "judge", STEPS, PEAK, loss_at)
    settle_statistics(network, [views(STEPS + i)[0] for i in range(50)])
    network.save_pretrained(WORK / "judge")
    save_preprocessing("judge", "ConvNextImageProcessor", do_resize=False, size={"shortest_edge": SIZE})

    fresh = batch(2000, OWN, 4)
    network.half().float()  # as it ships
    for name, images in (
        ("drawn", pixels(fresh.images)),
        ("decoded", decoded(fresh.images, torch.Generator().manual_seed(1)).float() / 255),
    ):
        with torch.no_grad():
            found = torch.cat([verdicts(network(part * 2 - 1).logits) for part in images.split(200)])
        right = (found == torch.from_numpy(fresh.labels)).float().mean(0)
        print(f"judge on {name}: " + ", ".join(f"{a} {r:.4f}" for a, r in zip(ATTRIBUTES, right, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
