"""The loop of a training run: what is the same whatever is learned.

A recipe keeps its model, its loss and its evaluations; `TrainingRun` has the run's folder, how it
continues, the stream of batches, what the processes agree on, counters, log, checkpoints and how it
stops:

    engine.start()                                    # pretrain/engine.py, made before the data
    plan = plan_run(cfg, len(clips), engine.processes)
    with TrainingRun(folder, cfg, fingerprint, plan, engine, MAY_CHANGE) as run:
        run.print_plan("what is learned", {"model": name})
        wrapped = engine.prepare(model, make_optimizers)
        run.restore({"loss": None})
        with run.batches(dataset) as batches:
            while run.unfinished:
                loss, norm = train_step(wrapped, engine, batches, ...)  # the method: in the recipe
                (loss,) = run.agree(norm, means=[loss])            # one all-reduce
                if run.log_due():
                    run.log({"loss": loss}, f"loss {loss:.4f}")
                run.finish_step({"loss": loss})                    # saves if due, stops if asked
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import checkpoint, device, log
from pretrain.data.progress import Bar
from pretrain.data.shards import Mixture, Positions, TrainBatches, TrainClips, train_batches
from pretrain.engine import Engine
from pretrain.flags import flat
from pretrain.folders import writing
from pretrain.names import counted, for_screen
from pretrain.processes import StopFlag, loader_workers
from pretrain.run import begin_run, open_run, restore
from pretrain.run_report import RunReport
from pretrain.saving import Saver
from pretrain.tracking import Tracker

MAX_SKIPPED = 5  # non-finite steps in a row that stop the run


@dataclass(frozen=True)
class Plan:
    """A resolved schedule.

    Attributes:
        steps: optimizer steps.
        warmup: of them, those that warm up.
        micro: decodes in one micro-batch of one process.
        accumulate: micro-batches of one process in a step.
        decodes_per_step: over all processes.
        batch_size: effective batch, counted in views.
        views: crops taken from one decode.
        num_clips: of one epoch.
        peak: highest learning rate.
        final: the rate at the end.
    """

    steps: int
    warmup: int
    micro: int
    accumulate: int
    decodes_per_step: int
    batch_size: int
    views: int
    num_clips: int
    peak: float
    final: float

    @property
    def rates(self) -> str:
        """The learning rates in words."""
        base = self.peak * 256 / self.batch_size
        return f"{base:g} per 256 clips -> {self.peak:g}, {self.final:g} at the end"


def plan_run(wanted, num_clips: int, processes: int, views: int = 1) -> Plan:
    """Steps, accumulation, learning rates and the sizes between them.

    Args:
        wanted: `batch_size` (effective, counted in views), `micro_batch` (most views that a process
            handles at once), `steps` or, where that is None, `epochs`, `warmup` (fraction of the
            steps), `base_lr` and `final_lr` (per 256 clips of the batch):
            `pretrain.settings.Optimisation`, or a configuration that has these flags itself.
        num_clips: of one epoch.
        processes: that share a batch.
        views: crops taken from one decode.

    Raises:
        ValueError: the effective batch cannot be divided as asked, or the schedule is empty.
    """
    batch_size = wanted.batch_size
    if batch_size < 1 or batch_size % (processes * views):
        raise ValueError(
            f"--batch-size {batch_size} cannot be shared evenly by {processes} processes with "
            f"{views} views of each clip: choose a multiple of {processes * views}"
        )
    per_process = batch_size // views // processes  # decodes in a step
    most = max(wanted.micro_batch // views, 1)
    micro = next(m for m in range(min(most, per_process), 0, -1) if per_process % m == 0)
    per_step = batch_size // views
    steps = wanted.steps or math.ceil((wanted.epochs or 0) * num_clips / per_step)
    if steps < 1:
        raise ValueError(f"--steps {wanted.steps} and --epochs {wanted.epochs} make no step at all")
    peak, final = (rate * batch_size / 256 for rate in (wanted.base_lr, wanted.final_lr))
    return Plan(
        steps, round(wanted.warmup * steps), micro, per_process // micro, per_step, batch_size,
        views, num_clips, peak, final,
    )  # fmt: skip


def record_bad_clips(run: Path, errors: list[dict]) -> None:
    """Append clips that could not be decoded to the run's ledger and name them on the screen.

    Raises:
        ValueError: the ledger cannot be written.
    """
    ledger = run / "data_errors.jsonl"
    for error in errors:
        print(
            for_screen(f"bad clip replaced: {error['source']}: {error['reason']}"),
            file=sys.stderr,
            flush=True,
        )
        with writing(ledger), open(ledger, "a") as file:
            file.write(json.dumps(error) + "\n")


def refuse_to_go_on(run: Path, state: dict, decodes_per_step: int, max_bad_clips: float) -> None:
    """Stop a run that no longer learns from the data it was given.

    Args:
        run: the run's folder, for the sentence.
        state: with `step`, `skipped_in_row` and `bad_clips`.
        decodes_per_step: clips of a step.
        max_bad_clips: fraction of the clips seen that may be undecodable.

    Raises:
        ValueError: too many steps in a row without a finite gradient, or too many bad clips.
    """
    if state["skipped_in_row"] >= MAX_SKIPPED:
        saved = checkpoint.checkpoints(run)
        left = f"{saved[0]} holds an earlier state" if saved else "nothing was saved yet"
        raise ValueError(
            f"the gradient was not finite in {MAX_SKIPPED} steps in a row, the last one "
            f"{state['step']}: lower --base-lr or try --precision fp32; {left}"
        )
    seen = state["step"] * decodes_per_step
    # At least 10, so that one bad clip does not end a short run.
    if state["bad_clips"] > max(max_bad_clips * seen, 10):
        raise ValueError(
            f"{state['bad_clips']} of {seen} clips could not be decoded, more than --max-bad-clips "
            f"{max_bad_clips:g}; they are listed in {run}/data_errors.jsonl: pack the data again"
        )


class TrainingRun:
    """One training run, on each of its processes.

    As a context manager it releases the folder's lock at the end, also after an error.

    Args:
        folder: the run's.
        config: the recipe's resolved configuration, a dataclass with `machine` and `run` (of
            `pretrain.settings`).
        fingerprint: of the data.
        plan: of `plan_run`.
        engine: started; it trains the model on the processes of this launch.
        may_change: names of more flags than `--out`, `--num-workers` and those of `RunSettings`
            that decide no number.

    Attributes:
        first: whether this is the main process, which logs, saves and evaluates.
        data: what identifies the data: `data_fingerprint` and `num_clips`.
        state: what a checkpoint holds beside weights: `step`, `skipped`, `skipped_in_row`,
            `bad_clips`, `seconds` and what the recipe adds.
        report: report.html, to which the recipe adds what it knows.

    Raises:
        ValueError: as `open_run`.
    """

    def __init__(
        self, folder: Path, config, fingerprint: str, plan: Plan, engine: Engine,
        may_change: set[str],
    ):  # fmt: skip
        self.folder, self.config, self.plan, self.engine = folder, config, plan, engine
        self.accelerator = accelerator = engine.accelerator
        self.first = accelerator.is_main_process
        self.data = {"data_fingerprint": fingerprint, "num_clips": plan.num_clips}
        self._lock, self._described = open_run(folder, config, self.data, may_change, accelerator)
        self.state: dict[str, Any] = {
            "run": self._described, "step": 0, "skipped": 0, "skipped_in_row": 0, "bad_clips": 0,
            "seconds": 0.0,
        }  # fmt: skip
        self._stop, self._stopping, self._early = StopFlag(), False, False
        self._saver = Saver(folder, engine.writers, config.run.async_save)
        self._tracker: Tracker | None = None
        self.report = RunReport(
            folder, plan.steps, accelerator.num_processes, getattr(config, "reasons", ())
        )

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(
        self, error: type[BaseException] | None, problem: BaseException | None, _: object
    ) -> None:
        if self.first and isinstance(problem, ValueError) and self.step:
            self.report.write("stopped", self.state, problem=str(problem))
        try:
            self._saver.wait()  # what has begun to be saved is finished, also after an error
        except (ValueError, SystemExit) as late:
            if error is None:
                raise
            print(f"warning: {for_screen(late)}", file=sys.stderr, flush=True)
        finally:
            if self._tracker:
                self._tracker.finish()
            if self._lock:
                self._lock.release(force=True)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state["step"]

    @property
    def unfinished(self) -> bool:
        """Whether there is a step to do."""
        return self.step < self.plan.steps and not self._early

    def restore(self, state: dict) -> None:
        """Put the newest valid checkpoint, if there is one, into what the engine has prepared.

        Args:
            state: what the recipe adds to that of a run which begins.

        Raises:
            ValueError: as `pretrain.run.restore`.
        """
        self.state = restore(self.folder, self.engine.load, self.state | state, say=self.first)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def batches(self, dataset: TrainClips | Mixture) -> Iterator[TrainBatches]:
        """The micro-batches of this process for the rest of the run; the log and the clock start.

        Raises:
            ValueError: the log cannot be written.
        """
        plan, group = self.plan, self.accelerator
        positions = Positions(
            self.step, plan.steps, plan.micro, plan.accumulate, group.num_processes,
            group.process_index, dataset.lane if dataset.streamed else None,
        )  # fmt: skip
        if self.first:
            self._log: log.RunLog = begin_run(self.folder, self._described, self.step)
            if name := self.config.run.track:
                about = self._described["config"] | self.data | vars(plan)
                self._tracker = Tracker(name, self.folder, self.step, about)
        self._began = time.monotonic() - self.state["seconds"]
        self._measured = False
        self._start_clock()
        workers = loader_workers(self.config.machine, on_cpu=0)
        with (
            train_batches(dataset, positions, workers) as self._batches,
            self._stop,
            # On a terminal alone: a log file has the lines of `log`.
            Bar(plan.steps, "training", "step", self.first, self.step, lines=False) as self._bar,
        ):
            yield self._batches

    def _start_clock(self) -> None:
        self._shown, self._clips = time.monotonic(), 0

    def agree(
        self, norm: float, means: Sequence[Tensor] = (), sums: Sequence[float] = ()
    ) -> list[float]:
        """Count a step that was taken, and make known to every process what each of them saw of it.

        Args:
            norm: the gradient's, over all processes; not finite: the weights were left alone.
            means: values of this process, to be averaged over the processes.
            sums: values of this process, to be added up.

        Returns:
            the means, then the sums.

        Raises:
            ValueError: too many steps in a row without a finite gradient, or too many bad clips;
                the ledger of bad clips cannot be written.
        """
        if self.step + 1 < self.plan.steps:
            self._batches.look_ahead(self.plan.accumulate)
        where, errors = self.accelerator.device, self._batches.errors
        counts = [bool(self._stop.signal or self._batches.lost), len(errors), *sums]
        # One small sum over the processes carries all that they must agree on.
        shared = torch.cat([
            torch.tensor(counts, dtype=torch.float32, device=where),
            torch.stack([m.detach().float() for m in means]) / self.accelerator.num_processes
            if means else torch.zeros(0, device=where),
        ])  # fmt: skip
        stopping, bad, *values = self.accelerator.reduce(shared).tolist()
        state, self._stopping = self.state, bool(stopping)
        self._skipped = not math.isfinite(norm)
        state["step"] += 1
        state["bad_clips"] += int(bad)
        state["skipped"] += self._skipped
        state["skipped_in_row"] = state["skipped_in_row"] + 1 if self._skipped else 0
        self._clips += self.plan.batch_size
        self._now = time.monotonic()  # what is measured next is not the speed of training
        if errors or self._skipped or self._stopping:
            self._bar.hide()
        record_bad_clips(self.folder, errors)
        self._batches.errors = []
        refuse_to_go_on(
            self.folder, state, self.plan.decodes_per_step, self.config.run.max_bad_clips
        )
        return values[len(sums) :] + values[: len(sums)]

    def due(self, every: int | None) -> bool:
        """Whether something is due that comes every so many steps and after the last one.

        Args:
            every: 0: only at the end; None: four times in a run.
        """
        every = self.plan.steps // 4 if every is None else every
        due = not self.unfinished or bool(every and self.step % every == 0)
        if due:
            self._bar.hide()
        self._measured = self._measured or due
        return due

    def end_early(self) -> None:
        """This step is the last one."""
        self._early = True

    def log_due(self) -> bool:
        """Whether to write a line: after what was `due`, a skipped step, or some seconds."""
        late = self._now - self._shown >= self.config.run.log_seconds
        due = self.first and (self._measured or self._skipped or not self.unfinished or late)
        if due:
            self._bar.hide()
        return due

    def log(self, values: dict, text: str, after: str = "") -> None:
        """Write a line of log.jsonl, and a line for a person.

        Args:
            values: what the recipe knows of the step.
            text: the same in words.
            after: more of it, at the end of the line.
        """
        state, took = self.state, self._now - self._shown
        speed = {"clips_per_s": self._clips / took}
        digits = 0 if speed["clips_per_s"] >= 10 else 1
        counts = {name: state[name] for name in ("skipped", "bad_clips")}
        values = values | speed | counts
        self._log.write(self.step, values)
        if self._tracker:
            self._tracker.log(self.step, values)
        parts = [
            f"step {self.step}/{self.plan.steps}", text,
            f"{speed['clips_per_s']:.{digits}f} clips/s (waiting for data "
            f"{self._batches.waited / took:.0%})",
            f"{self._log.time_left(self.step, self.plan.steps)} left", after,
            f"{state['skipped']} steps skipped" if state["skipped"] else "",
            f"{state['bad_clips']} bad clips replaced" if state["bad_clips"] else "",
        ]  # fmt: skip
        self._stop.say("  ".join(filter(None, parts)))
        self._start_clock()
        self._batches.waited = 0.0

    def finish_step(self, state: dict) -> None:
        """End a step: save if that is due, and stop if that was asked for.

        Args:
            state: what the recipe's part of the state has become.

        Raises:
            ValueError: as `Saver.save`; with --async-save that of the save before, too.
        """
        self.state |= state | {"seconds": time.monotonic() - self._began}
        report_due, self._measured = self._measured and self.report.due, False
        done = not self.unfinished
        self._saver.check()
        if done or self._stopping or self.step % self.config.run.save_every == 0:
            if self.first or self.engine.writers:
                about = self.state | {"model": self.engine.model.arguments}
                self._saver.save(*self.engine.held(), about)
            if done or self._stopping:
                self._saver.wait()
        self._bar.update()
        stops = self._stopping and not done
        if self.first and (stops or (report_due and not done)):
            self.report.write("interrupted" if stops else "under way", self.state)
        if stops:
            self._bar.hide()
            self.accelerator.wait_for_everyone()
            self._stop.leave(self.step, self.first, self._batches.lost)

    def end(self) -> bool:
        """Part from the other processes: the main one goes on alone and no other waits for it.

        Returns:
            whether this is the main process.
        """
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.first

    def print_plan(self, title: str, rows: Mapping[str, object]) -> None:
        """Print what the run resolved to, so that no number is applied silently.

        Args:
            title: above the table.
            rows: the recipe's, before those of every run.
        """
        if not self.first:
            return
        plan, group = self.plan, self.accelerator
        half = "bf16" if group.mixed_precision == "bf16" else "fp32"
        factors = (
            (group.num_processes, "processes"), (plan.accumulate, "micro-batches"),
            (plan.micro, "clips decoded"), (plan.views, "views"),
        )  # fmt: skip
        product = " x ".join(f"{n} {what}" for n, what in factors if n > 1)
        epochs = plan.steps * plan.decodes_per_step / plan.num_clips
        own = {
            "device": f"{group.num_processes} x {device.describe(group.device)}, {half}"
            + f", {self.engine.name}" * (self.engine.kind != "single"),
            "effective batch": counted(plan.batch_size, "clip")
            + (f" = {product}" if " x " in product else ""),
            "steps": f"{plan.steps} ({plan.warmup} warm-up) = {epochs:.1f} epochs",
            "run": self.folder,
        }
        self.report.title, self.report.rows = title, {**rows, **own}
        log.print_table(title, self.report.rows)

    def provenance(self, recipe: str, split: str) -> dict[str, Any]:
        """What an exported model says of its run; the recipe adds what was measured.

        Args:
            recipe: its name.
            split: of the data, that was trained on.
        """
        cfg = self.config
        return {
            "recipe": recipe, "preset": cfg.preset, "step": self.step, "steps": self.plan.steps,
            "seed": cfg.seed, "data": cfg.data, "split": split, **self.data, "config": flat(cfg),
        }  # fmt: skip

    def print_done(self, rows: Mapping[str, object], then: str) -> None:
        """Write the report, print where everything is, and hand the figures to the tracker.

        Args:
            rows: what the recipe wrote.
            then: the command that comes next.
        """
        own = self.report.write("finished", self.state, then) | {
            "log": self.folder / "log.jsonl",
            "checkpoints": self.folder / "checkpoints",
            "next": then,
        }
        if self._tracker:
            for figure in sorted(self.folder.glob("*.png")):
                self._tracker.figure(self.step, figure)
        print()
        log.print_table("done", {**rows, **own})
