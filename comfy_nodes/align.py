"""The node that trains: AlignProp inside the graph, with a bar, previews and a curve while it runs."""

import math
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from alignprop_pipe.layout import CURVE, SHEET

from . import host
from .widgets import config_from, connected, presets, setting_widgets

EVENT = "alignprop.step"
PREVIEWED = 4


class Align(io.ComfyNode):
    """Train a LoRA on the pipeline's denoiser so that its pictures score higher."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AlignPropAlign",
            display_name="Align (AlignProp)",
            description="Trains a LoRA by sending the reward's gradient back through the whole drawing of the picture "
            "(AlignProp). Held-out prompts are drawn with the same noise before and after, as evidence.",
            search_aliases=["alignprop", "train", "LoRA", "RLHF", "reward", "DRaFT", "fine-tune"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                host.Pipe.Input("pipe", tooltip="the model to align"),
                host.RewardSocket.Input("reward", tooltip="what its pictures shall become better at"),
                host.Prompts.Input(
                    "prompts", tooltip="what it draws meanwhile; some are held out, where there are enough"
                ),
                *_settings(),
                io.String.Input("run_name", default="alignprop/run", optional=True, tooltip=RUN_NAME),
            ],
            outputs=[
                host.AdapterSocket.Output(display_name="adapter", tooltip="the LoRA, for Save, Sample, Mix and Apply"),
                host.LoraModel.Output(display_name="lora", tooltip="the same for ComfyUI's own LoRA nodes"),
                host.LossMap.Output(display_name="loss_map", tooltip="for ComfyUI's own loss graph node"),
                io.Image.Output(
                    display_name="before", tooltip="the evidence: held-out prompts, drawn by the base model"
                ),
                io.Image.Output(display_name="after", tooltip="the same prompts and noise, with the adapter"),
                io.Image.Output(display_name="curve", tooltip="reward and held-out scores over the steps"),
                io.String.Output(display_name="report", tooltip="what changed, in numbers"),
                io.Image.Output(
                    display_name="before_after",
                    tooltip="one sheet: pairs before and after, with their prompts and what the judge says of them",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, truncation: Any = None) -> bool | str:
        # One text alone: ComfyUI repeats the message at every input that is named here, and leaves its range unchecked.
        try:
            config_from({} if truncation is None else {"truncation": truncation})
        except Exception as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, pipe: Any, reward: Any, prompts: Any, run_name: str = "alignprop/run", **settings: Any
    ) -> io.NodeOutput:
        with host.working():
            config, reward = config_from(settings), connected(reward)
            run = Run(str(cls.hidden.unique_id), config, prompts)
            with host.on_device(pipe, reward), host.counted_calls(pipe, run.progress):
                try:
                    result = pipe.align(
                        reward, prompts, config, out=host.run_folder(run_name), on_step=run.on_step, progress=False
                    )
                except KeyboardInterrupt:
                    run.progress.pass_on_stop()
                    raise
                finally:
                    from alignprop_pipe.diffusion import lora, pipeline_parts

                    # The adapter leaves through its own output; the pipeline goes on as the base model.
                    lora.detach(pipeline_parts.denoisers(pipe))
            if result.interrupted or run.progress.stopped:
                keep_stopped(result)
                run.progress.pass_on_stop()
            return outputs(result, run)


def _settings() -> list[Any]:
    made = [
        host.seed_input(widget.tooltip) if widget.name == "seed" else host.widget_input(widget)
        for widget in setting_widgets()
    ]
    made[0].extra_dict = {**made[0].extra_dict, "alignprop_presets": presets()}
    return made


class Run:
    """What the node shows while it trains."""

    def __init__(self, node_id: str, config: Any, prompts: Any) -> None:
        from alignprop_pipe.runs.summary import Watch

        self.node_id, self.config = node_id, config
        self.watch = Watch(config.loss)
        self.split = prompts.split(config.evaluation.eval_prompts, config.seed)
        looked_at = len(self.split.evidence)
        self.points: list[dict[str, Any]] = []
        calls, evaluation = config.sampling.num_inference_steps, config.evaluation
        looks = 0 if not looked_at else 2 + (config.steps - 1) // evaluation.eval_every if evaluation.eval_every else 2
        batches = looks * math.ceil(looked_at / evaluation.eval_batch_size)
        steps = config.steps * config.gradient_accumulation_steps
        self.progress = host.Progress(node_id, calls * (batches + steps))
        self.progress.say(f"{self.split.words}: drawing the evidence" if looked_at else "training")

    def on_step(self, record: Any) -> None:
        """Bar, text, preview and curve of one record."""
        self.watch.first_at(record)
        if self.points and self.points[-1]["step"] == record.step:  # the same step, with its evidence now
            self.points.pop()
        self.points.append(point(record))
        host.send(EVENT, {"node": self.node_id, "steps": self.config.steps, "point": self.points[-1]})
        pictures = record.evidence.images if record.evidence is not None else record.images
        if pictures is not None:
            self.progress.show(sheet(pictures[:PREVIEWED]))
        self.progress.say(self.text(record))

    def text(self, record: Any) -> str:
        """For the node: `step 3/50  reward 0.52  held-out 0.48  1 min 20 s left`, and what the evidence warns of."""
        from alignprop_pipe.escaping import one_line

        held_out = next((p["held_out"] for p in reversed(self.points) if p["held_out"] is not None), None)
        words = [f"step {record.step}/{self.config.steps}"]
        words += [f"reward {record.reward:.4g}"] if record.step and math.isfinite(record.reward) else []
        words += [f"{'held-out' if self.split.held_out else 'evidence'} {held_out:.4g}"] if held_out is not None else []
        left = self.progress.left()
        line = "  ".join([*words, f"{int(left // 60)} min {int(left % 60):02d} s left"])
        return "\n".join([line, *(f"warning: {one_line(warning.text)}" for warning in self.watch.holding)])


def point(record: Any) -> dict[str, Any]:
    """A record as the curve needs it."""
    look = record.evidence
    return {
        "step": record.step,
        "reward": record.reward if record.step and math.isfinite(record.reward) else None,
        "held_out": look.reward if look is not None and math.isfinite(look.reward) else None,
        "of": "held-out" if look is None or look.held_out else "training prompts, fresh noise",
        "judges": {} if look is None else {name: value for name, value in look.judges.items() if math.isfinite(value)},
    }


def sheet(pictures: Any) -> Any:
    """Up to four pictures on one, as a preview (PIL)."""
    from alignprop_pipe.images import enlarged, make_grid, to_pil

    return make_grid([enlarged(to_pil(picture)) for picture in pictures])


def keep_stopped(result: Any) -> None:
    """The user pressed stop: the adapter so far goes where LoRAs are, and the graph ends as it does for a stop."""
    if result.steps:
        path, listed = host.new_lora_path("AlignProp-stopped")
        result.adapter.save(path, format="comfyui")
        host.logger.warning("alignprop: stopped after %d steps; so far: models/loras/%s", result.steps, listed)
        host.logger.warning("alignprop: %s; report: %s", words_of(result), host.shown_in(result.run_folder))


def words_of(result: Any) -> str:
    """What came of a run, on one line."""
    from alignprop_pipe.escaping import one_line

    return one_line("; ".join(f"{name}: {text}" for name, text in result.rows() if name != "run folder"))


def outputs(result: Any, run: Run) -> io.NodeOutput:
    """The node's outputs, and what it shows when it is done."""
    folder = result.run_folder
    from alignprop_pipe.escaping import one_line

    report = "\n".join(f"{one_line(name)}: {one_line(text)}" for name, text in result.rows() if name != "run folder")
    report += f"\nreport: {host.shown_in(folder / 'report.html')}"
    steps = [record for record in result.history if record.step]
    losses = {"loss": [record.loss for record in steps], "reward": [record.reward for record in steps]}
    ui = {"text": (report,), "alignprop_curve": ({"steps": run.config.steps, "points": run.points},)}
    return io.NodeOutput(
        result.adapter,
        result.adapter.comfyui_tensors(),
        losses,
        images_of(result.before),
        images_of(result.after),
        picture_file(folder / CURVE),
        report,
        picture_file(folder / SHEET) if (folder / SHEET).is_file() else images_of(None),
        ui=ui | shown_images(folder),
    )


def images_of(look: Any) -> Any:
    """The pictures of an evaluation as IMAGE; one black picture where there was none."""
    import torch

    return torch.zeros(1, 64, 64, 3) if look is None or look.images is None else host.image_of(look.images)


def picture_file(path: Path) -> Any:
    """A picture from disk as IMAGE."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)[None]


def shown_images(folder: Path) -> dict[str, Any]:
    """The sheet of before and after for the node itself, out of the run folder."""
    path = folder / SHEET
    output = Path(host.folder_paths.get_output_directory()).resolve()
    if not path.is_file() or not path.resolve().is_relative_to(output):
        return {}
    subfolder = str(path.resolve().parent.relative_to(output))
    return {"images": [{"filename": path.name, "subfolder": subfolder, "type": "output"}]}


RUN_NAME = "where the report, pictures and curve of the run go, inside ComfyUI's output folder; a number is added"
