"""What is checked of a pipeline class: pictures, gradients, the adapter file, and a step of `align`.

The references are made without the package: the undecorated stock call, with the denoisers' outputs before the cut
detached by plain hooks, and central differences of the decorated one.
"""

import functools
import inspect
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from by_hand import direction_of, dot, double_inside, relative_difference
from torch import Tensor, nn

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.config.settings import FIELD_PATHS, AlignConfig, LoraOptions
from alignprop_pipe.config.truncation import LastK
from alignprop_pipe.diffusion import lora, patching, pipeline_parts
from alignprop_pipe.diffusion.rollout import rollout, with_backward
from alignprop_pipe.errors import AlignError
from alignprop_pipe.records import PromptBatch
from sweep.build import CannotBuild, build
from sweep.classes import arguments, call_parameters
from sweep.recipes import recipe_for

WORKS, REFUSED, CANNOT, WRONG = "works", "refused", "cannot be built", "WRONG"
NOT_REACHED = "not reached"
EXACT, CLOSE = 1e-9, 1e-3
"""How far a gradient may be from its reference, over its largest entry: in float64 and in float32."""
SLOPE = 1e-3


@dataclass(slots=True)
class Result:
    """What came of one class; `checks` says what was compared, `notes` what else is worth knowing."""

    name: str
    outcome: str = WRONG
    words: str = ""
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Mismatch(Exception):
    """Something of ours differs from the stock pipeline's."""


@dataclass(slots=True)
class Case:
    """A pipeline with the arguments of its call, and the output_type that its stock call can do.

    `is_raw` where that hands out [-1, 1] instead of [0, 1], `is_cut` where it overshoots [0, 1].
    """

    kind: type
    pipe: Any
    batch: int
    arguments: dict[str, Any]
    output_type: str = "pt"
    is_raw: bool = False
    is_cut: bool = False

    @classmethod
    def of(cls, kind: type) -> "Case":
        """Raises CannotBuild where it cannot be made, or the stock call does not run."""
        try:
            pipe = build(kind)
        except CannotBuild:
            raise
        except Exception as error:
            raise CannotBuild(f"its parts do not go together offline: {said(error)}") from error
        batch = recipe_for(kind.__name__).batch
        case = cls(kind, pipe, batch, arguments(kind, batch))
        errors = []
        for case.output_type in ("pt", "np", "pil"):
            try:
                case.stock_pictures()
            except Exception as error:
                errors.append(said(error))
            else:
                return case
        raise CannotBuild(f"the stock call of the miniature stops: {errors[0]}")

    @property
    def prompts(self) -> list[str]:
        return list(recipe_for(self.kind.__name__).prompts[: self.batch])

    def generators(self) -> dict[str, Any]:
        made = [torch.Generator().manual_seed(7 + number) for number in range(self.batch)]
        return {"generator": made if self.batch > 1 else made[0]} if self.takes_generator else {}

    @property
    def takes_generator(self) -> bool:
        return "generator" in call_parameters(self.kind)

    def stock_call(self, call: Any) -> Any:
        given = {"output_type": self.output_type}
        taken = call_parameters(self.kind)
        given = {name: value for name, value in given.items() if name in taken}
        torch.manual_seed(0)  # some draw from the global generator, whatever they are given
        # Some write into the lists that they are given.
        own = {name: list(value) if isinstance(value, list) else value for name, value in self.arguments.items()}
        return self.laid_out(first(call(self.pipe, **own, **self.generators(), **given)))

    def laid_out(self, found: Any) -> Any:
        """Pictures [batch, 3, height, width], videos [batch, frames, 3, height, width], whatever the pipeline does."""
        if isinstance(found, np.ndarray):
            found = torch.from_numpy(found)
        if isinstance(found, Tensor) and found.shape[-1] == 3 != found.shape[-3]:
            found = found.movedim(-1, -3)
        if isinstance(found, Tensor) and found.ndim == 5 and found.shape[1] == 3 != found.shape[2]:
            return found.transpose(1, 2)
        if isinstance(found, Tensor) and found.ndim == 4 and self.batch == 1 < len(found):
            return found[None]
        return found

    def stock_pictures(self) -> Any:
        return self.stock_call(self.kind.__call__)

    def in_range(self, images: Tensor) -> Tensor:
        images = images / 2 + 0.5 if self.is_raw else images
        return on_white(images.clamp(0, 1) if self.is_raw or self.is_cut else images)

    def settings(self, **changed: Any) -> tuple[AlignConfig, dict[str, Any]]:
        """The arguments as the package takes them: settings of AlignConfig, and the rest for the call."""
        given = {name: value for name, value in self.arguments.items() if name != "prompt"}
        known = {name: given.pop(name) for name in list(given) if name in FIELD_PATHS and name != "image"}
        if isinstance(known.get("negative_prompt"), list):
            known["negative_prompt"] = known["negative_prompt"][0]
        return AlignConfig().replace(**known, **changed), given

    def ours(self, **changed: Any) -> Any:
        config, given = self.settings(**changed)
        generators = [torch.Generator().manual_seed(7 + number) for number in range(self.batch)]
        batch = PromptBatch(self.prompts)
        torch.manual_seed(0)
        with patching.guards_off(self.pipe):  # as `align` does
            return rollout(self.pipe, batch, config, generators, torch.Generator(), **given)


def on_white(images: Tensor) -> Tensor:
    """Pictures with an alpha channel over white; others as they are."""
    if images.shape[-3] != 4:
        return images
    alpha = images[..., 3:, :, :]
    return images[..., :3, :, :] * alpha + (1 - alpha)


def first(output: Any) -> Any:
    """What the call returns first, in one tensor where it is a list of them."""
    found = output[0]
    is_list = isinstance(found, list) and found and all(isinstance(part, Tensor) for part in found)
    found = torch.stack(found) if is_list else found
    return found


def said(error: BaseException) -> str:
    """An error in one line, with the place in diffusers or transformers that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" in frame.filename]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{place}"


def check(kind: type) -> Result:
    """Everything about one class; never raises but for Ctrl-C."""
    result = Result(kind.__name__)
    try:
        case = Case.of(kind)
    except CannotBuild as error:
        result.outcome, result.words = CANNOT, str(error)
        return result
    try:
        adapted(case.pipe)
        check_pictures(case, result)
        check_file(case, result)
        check_gradients(case, result)
        check_align(case, result)
        result.outcome = WORKS
    except AlignError as error:
        result.outcome, result.words = REFUSED, " ".join(str(error).split())
    except Mismatch as error:
        result.outcome, result.words = WRONG, str(error)
    except Exception as error:
        result.outcome, result.words = WRONG, f"an error that is not ours: {said(error)}"
        try:
            check_align(case, result)
        except AlignError as ours:
            result.outcome, result.words = REFUSED, " ".join(str(ours).split())
        except Exception:
            if error_of_stock(case) == said(error):
                result.outcome, result.words = CANNOT, f"the stock call has no gradient here: {said(error)}"
    return result


def error_of_stock(case: Case) -> str:
    """What the backward pass through the undecorated stock call raises, without anything of ours."""
    try:
        Reference(case, lora.trainable(pipeline_parts.denoisers(case.pipe))).gradient(0)
    except Exception as error:
        return said(error)
    return ""


def adapted(pipe: Any) -> list[nn.Parameter]:
    """An adapter that is in use already: its up-projections are no longer zero."""
    denoisers = pipeline_parts.denoisers(pipe)
    lora.attach(denoisers, LoraOptions(rank=2), seed=0)
    generator = torch.Generator().manual_seed(11)
    for weight in lora.trainable(denoisers):
        weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return lora.trainable(denoisers)


def check_pictures(case: Case, result: Result) -> None:
    wanted = case.stock_pictures()
    if not isinstance(wanted, Tensor):
        wanted = torch.as_tensor(wanted)
    for weight in lora.trainable(pipeline_parts.denoisers(case.pipe)):
        weight.requires_grad_(True)
    rolled = case.ours(truncation="full")
    images = rolled.images.detach()
    raw = on_white((wanted.float() / 2 + 0.5).clamp(0, 1))
    if wanted.shape[-3] == 4:
        result.notes.append("the stock call hands out an alpha channel; ours are put on white")
        wanted = on_white(wanted.clamp(0, 1))
    if images.shape != wanted.shape:
        raise Mismatch(f"pictures of shape {tuple(images.shape)}, the stock call's {tuple(wanted.shape)}")
    if torch.equal(images, wanted):
        result.checks.append("pictures")
    elif torch.equal(images, wanted.clamp(0, 1)):
        result.checks.append("pictures")
        result.notes.append("the stock call overshoots [0, 1] for output_type='pt'; ours are cut to it")
        case.is_cut = True
    elif torch.equal(images, raw):
        result.checks.append("pictures")
        case.is_raw = True
        result.notes.append("the stock call hands out [-1, 1] for output_type='pt'; ours are brought to [0, 1]")
    else:
        raise Mismatch(f"pictures differ from the stock call's by {float((images - wanted).abs().max()):.2g}")
    if not images.isfinite().all():
        raise Mismatch("pictures are not finite; the miniature is no good")
    result.notes.append(f"{rolled.num_steps} steps")


def check_file(case: Case, result: Result) -> None:
    """Written, read by a fresh pipeline of the same weights, drawn with."""
    wanted = case.stock_pictures()
    with tempfile.TemporaryDirectory() as folder:
        paths = AlignPropPipeline.from_pipe(case.pipe).save_adapter(Path(folder) / "adapter.safetensors")
        fresh = build(case.kind)
        plain = Case(case.kind, fresh, case.batch, case.arguments).stock_pictures()
        AlignPropPipeline.from_pipe(fresh).load_adapter(paths[0])
    got = Case(case.kind, fresh, case.batch, case.arguments).stock_pictures()
    if not same(got, wanted):
        raise Mismatch("the adapter that was saved and read back draws other pictures")
    if same(plain, wanted):
        raise Mismatch("the adapter changes no picture; the miniature is no good")
    result.checks.append("adapter file")


def same(left: Any, right: Any) -> bool:
    return torch.equal(torch.as_tensor(left), torch.as_tensor(right))


# --- gradients -------------------------------------------------------------------------------------------------------


def check_gradients(case: Case, result: Result) -> None:
    weights = lora.trainable(pipeline_parts.denoisers(case.pipe))
    double = in_double(case)
    with double_inside() if double else ExitStack():
        result.notes.append("float64" if double else "in float32, since float64 does not go through its code")
        reference = Reference(case, weights)
        steps = reference.count()
        for k in sorted({1, 2, steps or 1}) if steps else [0]:
            if steps and k > steps:
                continue
            got = with_backward(case.pipe, functools.partial(our_gradient, case, k, weights))
            wanted = reference.gradient(k)
            difference = relative_difference(got, wanted)
            if not difference <= (EXACT if double else CLOSE):
                raise Mismatch(f"gradient for K={k or 'T'} of {steps} is off by {difference:.2g} of its largest entry")
            result.checks.append(f"gradient K={k}" if k and k != steps else "gradient K=T")
        full = got
        check_slope(case, result, weights, full, double)


def our_gradient(case: Case, k: int, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    return gradient(case.ours(truncation=LastK(k) if k else "full").images, weights)


def in_double(case: Case) -> bool:
    """The pipeline in float64, where its code lets it; else as it was."""
    case.pipe.to(torch.float64)
    for part in pipeline_parts.components(case.pipe).values():
        part.to(torch.float64)
    try:
        with double_inside():
            parts = Reference(case, lora.trainable(pipeline_parts.denoisers(case.pipe))).gradient(0)
        if not all(part.isfinite().all() for part in parts):
            raise FloatingPointError
        return True
    except Exception:
        case.pipe.to(torch.float32)
        for part in pipeline_parts.components(case.pipe).values():
            part.to(torch.float32)
        return False


def gradient(images: Tensor, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(score(images), weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


def score(images: Tensor) -> Tensor:
    """A smooth function that tells all pixels apart."""
    weight = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (weight * images.double() + (images.double() - 0.5).square()).sum() / len(images)


@dataclass(slots=True)
class Reference:
    """The gradient of the undecorated stock call."""

    case: Case
    weights: list[nn.Parameter]
    step: int = field(default=0, init=False)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """`step` counts: one is through when a network with the adapter is called after a step of the scheduler.

        Steps of deep copies count too: for some pipelines nothing else steps.
        """
        kind, plain = type(self.case.pipe.scheduler), type(self.case.pipe.scheduler).step
        self.step, stepped = 0, False

        @functools.wraps(plain)
        def stepping(one: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal stepped
            stepped = True
            return plain(one, *args, **kwargs)

        def called(*_: Any) -> None:
            nonlocal stepped
            self.step, stepped = self.step + stepped, False

        kind.step = stepping
        handles = [part.register_forward_pre_hook(called) for part in pipeline_parts.denoisers(self.case.pipe).values()]
        try:
            yield
        finally:
            called()
            kind.step = plain
            for handle in handles:
                handle.remove()

    def count(self) -> int:
        with self.counted():
            self.case.stock_pictures()
        return self.step

    def gradient(self, k: int) -> list[Tensor]:
        """Of the score, where only the last `k` steps carry gradient; all where it is 0."""
        cut = 0 if not k else self.count() - k
        with ExitStack() as stack:
            for network in self.case.pipe.components.values():
                if isinstance(network, nn.Module) and any("lora_" in name for name, _ in network.named_parameters()):
                    stack.enter_context(replaced(network, "forward", self._cut(network.forward, cut)))
            stack.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
            stack.enter_context(decorators_off())
            stack.enter_context(arrays_off())
            stack.enter_context(self.counted())
            stack.enter_context(torch.enable_grad())
            images = self.case.in_range(self.case.stock_call(inspect.unwrap(self.case.kind.__call__)))
            if not images.requires_grad:
                raise Mismatch("the reference loses the gradient where ours keeps it")
            return gradient(images, self.weights)

    def _cut(self, forward: Any, cut: int) -> Any:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(self.step >= cut):
                return forward(*args, **kwargs)

        return call


@contextmanager
def decorators_off() -> Iterator[None]:
    """`torch.no_grad` switches nothing off inside: methods of pipelines and networks may be decorated with it."""
    enter, leave = torch.no_grad.__enter__, torch.no_grad.__exit__
    torch.no_grad.__enter__ = lambda _self: None
    torch.no_grad.__exit__ = lambda *_: None
    try:
        yield
    finally:
        torch.no_grad.__enter__, torch.no_grad.__exit__ = enter, leave


@contextmanager
def arrays_off() -> Iterator[None]:
    """A tensor with a gradient stays a tensor inside, where code asks for it as an array."""
    plain = Tensor.numpy
    Tensor.numpy = lambda self, *given, **named: self if self.requires_grad else plain(self, *given, **named)
    try:
        yield
    finally:
        Tensor.numpy = plain


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute that the instance itself does not have, and take it away again."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


def check_slope(case: Case, result: Result, weights: Sequence[nn.Parameter], got: list[Tensor], double: bool) -> None:
    """Along a random direction, by central differences of the decorated stock call; the step size that fits best.

    A wrong gradient fits at none: small sizes drown in float32 parts of the code, large ones in curvature and kinks.
    """
    direction = direction_of(got)
    kept = [weight.detach().clone() for weight in weights]
    wanted, best = dot(got, direction), (float("inf"), 0.0)
    for size in (1e-5, 1e-4, 1e-3) if double else (1e-3, 3e-3, 1e-2):
        try:
            up, down = (_moved(case, weights, kept, direction, sign * size) for sign in (1, -1))
        finally:
            for weight, start in zip(weights, kept, strict=True):
                weight.data.copy_(start)
        slope = (up - down) / (2 * size)
        best = min(best, (abs(slope - wanted) / max(abs(slope), abs(wanted), 1e-12), slope))
        if best[0] < (SLOPE if double else 20 * SLOPE):
            result.checks.append("slope")
            return
    result.notes.append(f"slope of the stock call {best[1]:.4g} where the gradient says {wanted:.4g}")


def _moved(case: Case, weights: Any, kept: Any, direction: Any, by: float) -> float:
    for weight, start, way in zip(weights, kept, direction, strict=True):
        weight.data.copy_(start + by * way)
    return float(score(case.in_range(case.stock_pictures())))


def check_align(case: Case, result: Result) -> None:
    """One step of the real thing, on a fresh pipeline."""
    pipe = AlignPropPipeline.from_pipe(build(case.kind))
    config, given = case.settings(steps=1, batch_size=case.batch, rank=2, eval_prompts=0, lr=1e-2)
    found = pipe.align("brightness", case.prompts, config, **given)
    if not all(record.loss == record.loss for record in found.history):
        raise Mismatch("the loss of a step is not a number")
    result.checks.append("align")
