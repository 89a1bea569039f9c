"""What every training stage here shares: resumable state, the learning rate, pictures as tensors."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SEED = 2310
WORK = Path(os.environ.get("ALIGNPROP_WORK", Path(__file__).parent / "work"))


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [n, h, w, 3] -> float [n, 3, h, w] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).contiguous(memory_format=torch.channels_last)


def learning_rate(step: int, steps: int, peak: float, warm: int = 150, decay: float = 0.35) -> float:
    """Warm-up, plateau, then linear to zero over the last `decay` of the steps."""
    falling = (steps - step) / max(1.0, decay * steps)
    return peak * min(1.0, (step + 1) / warm, falling)


def save_whole(path: Path, state: dict) -> None:
    """Write next to and rename, so that a killed run never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    torch.save(state, beside)
    beside.rename(path)


def save_preprocessing(folder: str, kind: str, **settings: object) -> None:
    """preprocessor_config.json for a network that takes pixels in [-1, 1]."""
    usual = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    scale = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    text = json.dumps({"image_processor_type": kind, **settings, **usual, **scale}, indent=2)
    (WORK / folder / "preprocessor_config.json").write_text(text + "\n")


class HalfPrecisionTrainer:
    """AdamW on float32 weights while the networks compute in bfloat16, with a running average of the weights.

    Whole networks in bfloat16 trained twice as fast as float32 on a CPU without matrix units, and faster than
    autocast; the float32 copies keep small updates from being rounded away.
    """

    def __init__(self, groups: list[tuple[nn.Module, float]], peak: float, average: float = 0.999) -> None:
        self.networks = [network for network, _ in groups]
        self.fast = [[p for p in network.parameters() if p.requires_grad] for network in self.networks]
        self.exact = [[p.detach().float().clone() for p in fast] for fast in self.fast]
        self.mean = [[p.clone() for p in exact] for exact in self.exact]
        self.optimizer = torch.optim.AdamW(
            [{"params": exact, "scale": scale} for exact, (_, scale) in zip(self.exact, groups, strict=True)],
            lr=peak,
            betas=(0.9, 0.99),
            weight_decay=0.01,
        )
        self.average = average

    def step(self, loss: Tensor, lr: float, step: int) -> None:
        loss.backward()
        for fast, exact in zip(self.fast, self.exact, strict=True):
            for quick, precise in zip(fast, exact, strict=True):
                precise.grad = quick.grad.float() if quick.grad is not None else None
                quick.grad = None
        self._update(lr, step)

    @torch.no_grad()
    def _update(self, lr: float, step: int) -> None:
        torch.nn.utils.clip_grad_norm_([p for exact in self.exact for p in exact], 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()
        keep = min(self.average, (step + 1) / (step + 10))
        for fast, exact, mean in zip(self.fast, self.exact, self.mean, strict=True):
            torch._foreach_copy_(fast, exact)
            torch._foreach_lerp_(mean, exact, 1 - keep)

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the running average into the networks, as float32."""
        for network, fast, mean in zip(self.networks, self.fast, self.mean, strict=True):
            network.float()
            torch._foreach_copy_(fast, mean)

    def state(self) -> dict:
        return {"exact": self.exact, "mean": self.mean, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: dict) -> None:
        for name in ("exact", "mean"):
            for kept, loaded in zip(getattr(self, name), state[name], strict=True):
                torch._foreach_copy_(kept, loaded)
        for fast, exact in zip(self.fast, self.exact, strict=True):
            torch._foreach_copy_(fast, exact)
        self.optimizer.load_state_dict(state["optimizer"])


def train(
    trainer: HalfPrecisionTrainer,
    stage: str,
    steps: int,
    peak: float,
    loss_at: Callable[[int], Tensor],
    every: int = 100,
) -> None:
    """Run `loss_at(step)` to the end, from the last saved state if there is one."""
    path, start, seconds = WORK / f"{stage}.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        trainer.load(state["trainer"])
        start, seconds = state["step"], state["seconds"]
    seen, began = [], time.monotonic() - seconds
    for step in range(start, steps):
        loss = loss_at(step)
        trainer.step(loss, learning_rate(step, steps, peak), step)
        seen.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == steps:
            seconds = time.monotonic() - began
            save_whole(path, {"trainer": trainer.state(), "step": step + 1, "seconds": seconds})
            print(f"{stage} {step + 1}/{steps} loss {np.mean(seen[-every:]):.4f} {seconds:.0f}s", flush=True)
    trainer.use_average()
