"""Training of the audio-adaptive encoder (METHODS 5.6): epochs, states to resume from, validation on the source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.specs import FeatureSpec
from echoshift.train.loop import PlannedBatch, plan_epoch
from echoshift.train.ranks import Ranks
from echoshift.train.scores import compute_scores
from echoshift.train.splits import LabelledSegments
from echoshift.train.stage1.audio import AudioFeatures
from echoshift.train.stage1.clips import ClipSource
from echoshift.train.stage1.config import TrainingConfig
from echoshift.train.stage1.encoder import AudioAdaptiveEncoder
from echoshift.train.stage1.export import predict_segments
from echoshift.train.stage1.losses import compute_absent_loss, compute_source_loss
from echoshift.train.watching import EpochWatcher

STATE = "training-state.pt"


@dataclass(frozen=True, slots=True)
class EncoderTask:
    """Data that the encoder trains on; of the unlabelled target ids and absent activities alone.

    Attributes:
        source, source_weights: labelled source segments and their weights (Eq. 3), [n] or [n, K].
        labelled, labelled_weights: likewise of the target's labelled part; may be empty.
        target_ids, absent: the target's unlabelled segments and their absent activities, bool [n, K].
        source_val: what is scored now and then, on the clips of `validation_spec`; may be empty.
        absent_weight: lambda.
    """

    source: LabelledSegments
    source_weights: np.ndarray
    labelled: LabelledSegments
    labelled_weights: np.ndarray
    target_ids: tuple[str, ...]
    absent: np.ndarray
    source_val: LabelledSegments
    validation_spec: FeatureSpec
    classes: tuple[str, ...]
    absent_weight: float
    multi_label: bool


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """Outcome of one epoch: mean loss parts by name, and the score on the source's validation split, if taken."""

    epoch: int
    losses: Mapping[str, float]
    validation: float | None = None


def train_encoder(
    model: AudioAdaptiveEncoder,
    task: EncoderTask,
    clips: ClipSource,
    audio: AudioFeatures,
    config: TrainingConfig,
    folder: Path,
    *,
    lr: float,
    seed: int,
    device: torch.device,
    ranks: Ranks,
    watcher: EpochWatcher,
    title: str,
) -> list[EpochRecord]:
    """Train in place, in `folder`, which keeps a state after each epoch; a run that was killed resumes from it.

    Whatever is random in an epoch is drawn from (seed, epoch, rank), views of audio from (seed, epoch, segment), so
    that an interrupted run and an uninterrupted one end alike. Losses go to TensorBoard files in `folder`/tensorboard.
    Raises RunError where a loss is no longer a number.
    """
    training = _Training(model, task, clips, audio, config, lr=lr, seed=seed, device=device, ranks=ranks)
    records = training.read_state(folder / STATE)
    n_batches = len(training.plan_epoch(0))
    watcher.start(title, n_batches * (config.n_epochs - len(records)))
    with _write_scalars(folder / "tensorboard", len(records), ranks) as write_scalar:
        for epoch in range(len(records), config.n_epochs):
            losses = training.run_epoch(epoch, watcher)
            validation = None
            is_due = config.validate_every and (epoch + 1) % config.validate_every == 0
            if is_due and len(task.source_val) and ranks.is_first:
                validation = training.validate()
                write_scalar("validation/source", validation, epoch)
            for name, value in losses.items():
                write_scalar(f"loss/{name}", value, epoch)
            records.append(EpochRecord(epoch, losses, validation))
            watcher.describe(f"{title}, epoch {epoch + 1}/{config.n_epochs}: {_describe_epoch(records)}")
            if ranks.is_first:
                training.write_state(folder / STATE, records)
            ranks.wait()
    return records


class _Training:
    """A model, its optimiser and its data while it trains."""

    def __init__(
        self,
        model: AudioAdaptiveEncoder,
        task: EncoderTask,
        clips: ClipSource,
        audio: AudioFeatures,
        config: TrainingConfig,
        *,
        lr: float,
        seed: int,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        size = min(config.n_source, len(task.source))
        if size < ranks.n_ranks:
            raise RunError(
                f"a batch of {size} source segments can't be shared among {ranks.n_ranks} processes; raise "
                f"training.n_source, or start fewer"
            )
        if model.objective is not None and ranks.n_ranks > 1:
            raise RunError(
                "an objective trains in one process: its means are over whole batches; start without torchrun"
            )
        self.model, self.task, self.clips, self.audio, self.config = model, task, clips, audio, config
        self.seed, self.device, self.ranks = seed, device, ranks
        model.to(device)
        gated: Any = model.gated  # torch's stubs know no such layout
        gated.to(memory_format=torch.channels_last_3d)  # 1.4 times as fast on a CPU, faster on GPUs under autocast
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=lr, weight_decay=config.weight_decay)
        self.module: nn.Module = model if ranks.n_ranks == 1 else nn.parallel.DistributedDataParallel(model)
        self.domains = sorted({segment.domain for segment in task.source.segments})

    def plan_epoch(self, epoch: int) -> list[PlannedBatch]:
        """Plan the batches of an epoch."""
        sizes = (len(self.task.source), len(self.task.labelled), len(self.task.target_ids))
        return plan_epoch(*sizes, self.config, seed=self.seed, epoch=epoch)

    def run_epoch(self, epoch: int, watcher: EpochWatcher) -> dict[str, float]:
        """Train one epoch, and return its mean losses by name."""
        with _seeded(self.seed, epoch, self.ranks.rank, self.device):
            losses = self._run_batches(epoch, watcher)
        for name, tensor in self.model.get_trained_tensors().items():
            if not tensor.isfinite().all():
                raise RunError(f"{name} isn't finite after epoch {epoch}; lower training.lr")
        return self.ranks.average(losses, self.device)

    def validate(self) -> float:
        """Score the source's validation split: top-1, or mAP where the task is multi-label."""
        task = self.task
        ids = [segment.segment_id for segment in task.source_val.segments]
        clips = self.clips.iterate_clips(ids, task.validation_spec)
        found = predict_segments(self.model, clips, self.audio, multi_label=task.multi_label, device=self.device)
        probabilities = np.stack([prediction.probabilities for prediction in found])
        scores = compute_scores(probabilities, task.source_val.labels, self.audio.has_audio(ids), task.classes)
        assert scores.main.value is not None, "the validation split has segments"
        return scores.main.value

    def write_state(self, path: Path, records: Sequence[EpochRecord]) -> None:
        """Replace the state that a killed run resumes from."""
        state = {
            "model": {name: tensor.detach().cpu() for name, tensor in self.model.get_trained_tensors().items()},
            "optimizer": self.optimizer.state_dict(),
            "records": [[r.epoch, dict(r.losses), r.validation] for r in records],
        }
        fresh = path.with_name(f"{path.name}.partial")
        torch.save(state, fresh)
        fresh.replace(path)

    def read_state(self, path: Path) -> list[EpochRecord]:
        """Load the state of a run that was killed, if there is one; return the epochs that it had done."""
        if not path.is_file():
            return []
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            records = [EpochRecord(epoch, losses, score) for epoch, losses, score in state["records"]]
        except (RuntimeError, EOFError, KeyError, ValueError) as error:
            raise RunError(
                f"{path} isn't a whole training state: {error}; delete it, and the encoder trains from the start"
            ) from error
        self.model.load_trained_tensors(state["model"], str(path))
        self.optimizer.load_state_dict(state["optimizer"])
        return records

    def _run_batches(self, epoch: int, watcher: EpochWatcher) -> dict[str, float]:
        self.model.train()
        batches = [
            batch.take_share(self.ranks.rank, self.ranks.n_ranks).split(self.config.n_accumulated)
            for batch in self.plan_epoch(epoch)
        ]
        ids = [self._list_ids(part) for parts in batches for part in parts]
        loaded = zip(ids, self.clips.iterate_batches(ids, epoch), strict=True)
        totals: dict[str, float] = {}
        for i_batch, parts in enumerate(batches):
            self.optimizer.zero_grad(set_to_none=True)
            for part in parts:
                inputs = self._move(*next(loaded), epoch)
                with self._sync_if(part is parts[-1]):
                    if self.model.objective is None:
                        losses = self._compute_losses(part, *inputs)
                    else:
                        progress = (epoch + i_batch / len(batches)) / self.config.n_epochs
                        losses = self._compute_objective(part, *inputs, progress)
                    losses["total"].backward()
                for name, value in losses.items():
                    totals[name] = totals.get(name, 0.0) + float(value.detach()) / len(batches)
            if not np.isfinite(totals["total"]):
                raise RunError(
                    f"the loss is {totals['total']} in batch {i_batch} of epoch {epoch}; lower training.lr, or train "
                    f"with training.precision=fp32"
                )
            self.optimizer.step()
            watcher.advance()
        return totals

    def _list_ids(self, part: PlannedBatch) -> list[str]:
        return [
            *(self.task.source.segments[i].segment_id for i in part.source),
            *(self.task.labelled.segments[i].segment_id for i in part.labelled),
            *(self.task.target_ids[i] for i in part.target),
        ]

    def _move(
        self, ids: list[str], visual: Mapping[str, Tensor], epoch: int
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Move a part's clips to the device, and its maps and `has_audio`, where audio decides anything."""
        if self.model.needs_audio:
            maps = self.audio.draw_maps(ids, self.seed, epoch)
        else:
            maps = torch.zeros(len(ids), self.audio.map_shape[0], 0, 0)
        placed = {}
        for name, value in visual.items():
            layout = torch.channels_last_3d if value.ndim == 5 else torch.preserve_format
            placed[name] = value.to(self.device, non_blocking=True).to(memory_format=layout)
        return placed, maps.to(self.device), torch.from_numpy(self.audio.has_audio(ids)).to(self.device)

    def _compute_losses(
        self, part: PlannedBatch, visual: Mapping[str, Tensor], audio_map: Tensor, has_audio: Tensor
    ) -> dict[str, Tensor]:
        """Compute all losses from one pass of the source's, the labelled and the unlabelled target's segments together.

        `total` is `source` + lambda `absent` (Eq. 4, whose second sum is over the source; the T in print is a slip),
        and `labelled`. Each is the part's contribution to the batch's loss: its own mean times its share.
        """
        task = self.task
        with self._autocast():
            logits = self.module(visual, audio_map, has_audio).float()
        of_source, of_labelled, of_target = logits.split([len(rows) for rows in part.rows])
        source_share, labelled_share, target_share = part.shares
        source = compute_source_loss(of_source, *self._label(task.source, task.source_weights, part.source))
        losses = {"source": source * source_share, "absent": torch.zeros_like(source.detach())}
        if len(part.target):
            absent = torch.from_numpy(task.absent[part.target]).to(self.device)
            absent_loss = compute_absent_loss(of_target, absent, multi_label=task.multi_label)
            losses["absent"] = absent_loss * target_share
        losses["total"] = losses["source"] + task.absent_weight * losses["absent"]
        if len(part.labelled):
            labels, weights = self._label(task.labelled, task.labelled_weights, part.labelled)
            losses["labelled"] = compute_source_loss(of_labelled, labels, weights) * labelled_share
            losses["total"] = losses["total"] + losses["labelled"]
        return losses

    def _compute_objective(
        self,
        part: PlannedBatch,
        visual: Mapping[str, Tensor],
        audio_map: Tensor,
        has_audio: Tensor,
        progress: float,
    ) -> dict[str, Tensor]:
        """Compute a method's losses of the source's and the target's segments; of a part, its share of the batch's."""
        assert self.model.objective is not None, "an objective is set"
        with self._autocast():
            pooled = self.model.compute_pooled(visual, audio_map, has_audio)
        source = self.task.source
        labels = torch.from_numpy(source.labels[part.source]).to(self.device)
        of_segments = [self.domains.index(source.segments[i].domain) for i in part.source]
        domains = torch.tensor(of_segments, device=self.device)
        terms = self.model.objective.compute_losses(pooled, audio_map, has_audio, labels, domains, progress)
        losses = {name: value * part.shares[0] for name, value in terms.items()}
        losses["total"] = torch.stack(list(losses.values())).sum()
        return losses

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _label(self, segments: LabelledSegments, weights: np.ndarray, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(segments.labels[rows]).to(self.device), torch.from_numpy(weights[rows]).to(self.device)

    def _sync_if(self, is_last: bool) -> Any:
        """Let processes that train together exchange gradients after the last part of a batch only."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return nullcontext()


def _describe_epoch(records: Sequence[EpochRecord]) -> str:
    """Describe in a few words how the last epoch went."""
    parts = [f"{name} {value:.3f}" for name, value in records[-1].losses.items()]
    scores = [record.validation for record in records if record.validation is not None]
    return ", ".join(parts) + (f", source validation {100 * scores[-1]:.1f} %" if scores else "")


@contextmanager
def _seeded(seed: int, epoch: int, rank: int, device: torch.device) -> Iterator[None]:
    """Draw dropout from (seed, epoch, rank) while the block runs, and leave torch's generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0] >> 1))
        yield


@contextmanager
def _write_scalars(folder: Path, n_done: int, ranks: Ranks) -> Iterator[Any]:
    """Return a function (name, value, epoch) that writes for TensorBoard; epochs of a killed run from n_done on go."""
    if not ranks.is_first:
        yield lambda name, value, epoch: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=n_done)
    try:
        yield writer.add_scalar
    finally:
        writer.close()
