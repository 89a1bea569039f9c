"""Pipelines in the states that people have: each is aligned exactly as it draws, or refused in words at once."""

from typing import Any

import miniatures
import pytest
from aligning import aligned, is_stock

from alignprop_pipe import lora, stock
from alignprop_pipe.config import LoraOptions
from alignprop_pipe.errors import PipelineError

# --- fused projections ------------------------------------------------------------------------------------------------

FUSABLE = {name: miniatures.FAMILIES[name] for name in ("sd15", "sdxl", "sd3", "flux", "pixart", "wan")}


@pytest.mark.parametrize("name", FUSABLE)
def test_fused_projections_are_refused_and_leave_no_layers_behind(name: str) -> None:
    pipe: Any = aligned(FUSABLE[name].make())
    ((component, denoiser),) = stock.denoisers(pipe).items()
    names = lora.attention_linears(denoiser)
    denoiser.fuse_qkv_projections()  # pyright: ignore[reportCallIssue]
    with pytest.raises(PipelineError, match=rf"{component}.*fuse_qkv.*{component}\.unfuse_qkv_projections\(\) first"):
        lora.attach({component: denoiser}, LoraOptions(rank=2), 0)
    assert is_stock(pipe)
    denoiser.unfuse_qkv_projections()  # pyright: ignore[reportCallIssue]
    assert lora.attention_linears(denoiser) == names  # the older classes keep the copies
    lora.attach({component: denoiser}, LoraOptions(rank=2), 0)
