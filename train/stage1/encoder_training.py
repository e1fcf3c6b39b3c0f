"""Trains the audio-adaptive encoder (METHODS 5.6): epochs, checkpoints to go on from, validation on the source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.specs import FeatureSpec
from echoshift.train.batches import EncoderInputs, LabelledTargetBatch, SourceBatch, TargetBatch
from echoshift.train.epoch_plan import PlannedBatch, plan_epoch
from echoshift.train.ranks import Ranks
from echoshift.train.scores import compute_scores
from echoshift.train.splits import LabelledSegments
from echoshift.train.stage1.audio_adaptive_encoder import AudioAdaptiveEncoder, predict_segments
from echoshift.train.stage1.config import TrainingConfig
from echoshift.train.stage1.encoder_losses import compute_encoder_losses, compute_source_loss
from echoshift.train.stage1.sound_features import SoundFeatures
from echoshift.train.stage1.visual_inputs import VisualInputs
from echoshift.train.watching import EpochWatcher

STATE = "training-state.pt"


@dataclass(frozen=True, slots=True)
class EncoderTask:
    """What the encoder trains on.

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

    @property
    def source_domains(self) -> tuple[str, ...]:
        """The source's domains, in the order of their names."""
        return tuple(sorted({segment.domain for segment in self.source.segments}))


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """What came of one epoch: mean loss parts by name, and the score on the source's validation split, if taken."""

    epoch: int
    losses: Mapping[str, float]
    validation: float | None = None


def train_encoder(
    model: AudioAdaptiveEncoder,
    task: EncoderTask,
    visual: VisualInputs,
    sound: SoundFeatures,
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
    """Train in place, in `folder`, where a state is kept after each epoch; a run that was killed goes on from it.

    Whatever is random in an epoch is drawn from (seed, epoch, rank), views of sound from (seed, epoch, segment), so
    that a run that was interrupted and one that wasn't come to the same. Losses go to TensorBoard files in
    `folder`/tensorboard. Raises RunError where a loss is no longer a number.
    """
    size = min(config.n_source, len(task.source))
    if size < ranks.n_ranks:
        raise RunError(
            f"a batch of {size} source segments can't be shared among {ranks.n_ranks} processes; raise "
            f"training.n_source, or start fewer"
        )
    if model.objective is not None and ranks.n_ranks > 1:
        raise RunError("an objective trains in one process: its means are over whole batches; start without torchrun")
    model.to(device)
    module: Any = model.gated  # torch's stubs know no such layout
    module.to(memory_format=torch.channels_last_3d)  # 1.4 times as fast on a CPU, faster on GPUs under autocast
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr, weight_decay=config.weight_decay)
    records = _read_state(folder / STATE, model, optimizer)
    trained: nn.Module = model
    if ranks.n_ranks > 1:
        trained = nn.parallel.DistributedDataParallel(model)
    sizes = (len(task.source), len(task.labelled), len(task.target_ids))
    n_batches = len(plan_epoch(*sizes, config, seed=seed, epoch=0))
    watcher.start(title, n_batches * (config.n_epochs - len(records)))
    with _write_scalars(folder / "tensorboard", len(records), ranks) as write_scalar:
        for epoch in range(len(records), config.n_epochs):
            planned = plan_epoch(*sizes, config, seed=seed, epoch=epoch)
            with _seeded(seed, epoch, ranks.rank, device):
                losses = _run_epoch(
                    trained, model, optimizer, planned, task, visual, sound, config, seed, epoch, device, ranks, watcher
                )
            validation = None
            is_due = config.validate_every and (epoch + 1) % config.validate_every == 0
            if is_due and len(task.source_val) and ranks.is_first:
                validation = _validate(model, task, visual, sound, device)
                write_scalar("validation/source", validation, epoch)
            for name, value in losses.items():
                write_scalar(f"loss/{name}", value, epoch)
            records.append(EpochRecord(epoch, losses, validation))
            watcher.describe(f"{title}, epoch {epoch + 1}/{config.n_epochs}: {describe_epoch(records)}")
            if ranks.is_first:
                _write_state(folder / STATE, model, optimizer, records)
            ranks.wait()
    return records


def describe_epoch(records: Sequence[EpochRecord]) -> str:
    """Describe in a few words how the last epoch went."""
    parts = [f"{name} {value:.3f}" for name, value in records[-1].losses.items()]
    scores = [record.validation for record in records if record.validation is not None]
    return ", ".join(parts) + (f", source validation {100 * scores[-1]:.1f} %" if scores else "")


def _run_epoch(
    trained: nn.Module,
    model: AudioAdaptiveEncoder,
    optimizer: torch.optim.Optimizer,
    planned: Sequence[PlannedBatch],
    task: EncoderTask,
    visual: VisualInputs,
    sound: SoundFeatures,
    config: TrainingConfig,
    seed: int,
    epoch: int,
    device: torch.device,
    ranks: Ranks,
    watcher: EpochWatcher,
) -> dict[str, float]:
    model.train()
    shares = [batch.take_share(ranks.rank, ranks.n_ranks) for batch in planned]
    parts = [batch.split(config.n_accumulated) for batch in shares]
    ids = [_list_ids(task, part) for batch in parts for part in batch]
    loaded = visual.iterate_batches(ids, epoch)
    totals: dict[str, float] = {}
    for i_batch, batch in enumerate(parts):
        optimizer.zero_grad(set_to_none=True)
        for i_part, part in enumerate(batch):
            with_sound = model.attention is not None or model.objective is not None
            part_ids = _list_ids(task, part)
            maps = sound.draw_maps(part_ids, seed, epoch) if with_sound else None
            inputs = _gather_inputs(part_ids, next(loaded), sound, maps, device)
            is_last = i_part == len(batch) - 1
            with _sync_if(trained, is_last):
                if model.objective is None:
                    losses = _compute_losses(trained, part, inputs, task, config, device)
                else:
                    progress = (epoch + i_batch / len(parts)) / config.n_epochs
                    losses = _compute_objective(model, part, inputs, task, config, device, progress)
                losses["total"].backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / len(parts)
        if not np.isfinite(totals["total"]):
            raise RunError(
                f"the loss is {totals['total']} in batch {i_batch} of epoch {epoch}; lower training.lr, or train with "
                f"training.precision=fp32"
            )
        optimizer.step()
        watcher.advance()
    for name, tensor in model.get_trained_tensors().items():
        if not tensor.isfinite().all():
            raise RunError(f"{name} isn't finite after epoch {epoch}; lower training.lr")
    return ranks.average(totals, device)


def _compute_losses(
    trained: nn.Module,
    part: PlannedBatch,
    inputs: EncoderInputs,
    task: EncoderTask,
    config: TrainingConfig,
    device: torch.device,
) -> dict[str, Tensor]:
    """Compute all losses from one pass of the source's, the labelled and the unlabelled target's segments together.

    Each is the part's contribution to the batch's loss: its own mean times its share.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = trained(inputs).float()
    sizes = [len(part.source), len(part.labelled), len(part.target)]
    of_source, of_labelled, of_target = torch.split(logits, sizes)
    own, labelled_inputs, target_inputs = _cut_inputs(inputs, sizes)
    source = SourceBatch(own, *_take(task.source, task.source_weights, part.source, device))
    target = None
    if len(part.target):
        target = TargetBatch(target_inputs, torch.from_numpy(task.absent[part.target]).to(device))
    means = compute_encoder_losses(
        of_source, source, of_target if target else None, target, task.absent_weight, multi_label=task.multi_label
    )
    source_share, labelled_share, target_share = part.shares
    losses = {"source": means["source"] * source_share, "absent": means["absent"] * target_share}
    losses["total"] = losses["source"] + task.absent_weight * losses["absent"]
    if len(part.labelled):
        batch = LabelledTargetBatch(
            labelled_inputs, *_take(task.labelled, task.labelled_weights, part.labelled, device)
        )
        losses["labelled"] = compute_source_loss(of_labelled, batch.labels, batch.weights) * labelled_share
        losses["total"] = losses["total"] + losses["labelled"]
    return losses


def _compute_objective(
    model: AudioAdaptiveEncoder,
    part: PlannedBatch,
    inputs: EncoderInputs,
    task: EncoderTask,
    config: TrainingConfig,
    device: torch.device,
    progress: float,
) -> dict[str, Tensor]:
    """Compute a method's losses of the source's and the target's segments; of a part, its share of the batch's."""
    assert model.objective is not None, "there is an objective"
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        pooled = model.compute_pooled(inputs)
    labels = torch.from_numpy(task.source.labels[part.source]).to(device)
    names = task.source_domains
    domains = torch.tensor([names.index(task.source.segments[i].domain) for i in part.source], device=device)
    terms = model.objective.compute_losses(pooled, inputs, labels, domains, progress)
    losses = {name: value * part.shares[0] for name, value in terms.items()}
    losses["total"] = torch.stack(list(losses.values())).sum()
    return losses


def _list_ids(task: EncoderTask, part: PlannedBatch) -> list[str]:
    return [
        *(task.source.segments[i].segment_id for i in part.source),
        *(task.labelled.segments[i].segment_id for i in part.labelled),
        *(task.target_ids[i] for i in part.target),
    ]


def _gather_inputs(
    ids: Sequence[str], visual: Mapping[str, Tensor], sound: SoundFeatures, maps: Tensor | None, device: torch.device
) -> EncoderInputs:
    maps = torch.zeros(len(ids), *sound.map_shape[:1], 0, 0) if maps is None else maps
    return EncoderInputs(
        {name: _place(value, device) for name, value in visual.items()},
        maps.to(device),
        torch.from_numpy(sound.has_audio(ids)).to(device),
    )


def _place(value: Tensor, device: torch.device) -> Tensor:
    layout = torch.channels_last_3d if value.ndim == 5 else torch.preserve_format
    return value.to(device, non_blocking=True).to(memory_format=layout)


def _cut_inputs(inputs: EncoderInputs, sizes: Sequence[int]) -> list[EncoderInputs]:
    cut, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        visual = {name: value[rows] for name, value in inputs.visual.items()}
        cut.append(EncoderInputs(visual, inputs.audio_map[rows], inputs.has_audio[rows]))
        start += size
    return cut


def _take(
    segments: LabelledSegments, weights: np.ndarray, rows: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(segments.labels[rows]).to(device), torch.from_numpy(weights[rows]).to(device)


def _validate(
    model: AudioAdaptiveEncoder, task: EncoderTask, visual: VisualInputs, sound: SoundFeatures, device: torch.device
) -> float:
    """Score the source's validation split: top-1, or mAP where the task is multi-label."""
    ids = [segment.segment_id for segment in task.source_val.segments]
    clips = visual.iterate_clips(ids, task.validation_spec)
    found = predict_segments(model, clips, sound, multi_label=task.multi_label, device=device)
    probabilities = np.stack([prediction.probabilities for prediction in found])
    scores = compute_scores(probabilities, task.source_val.labels, sound.has_audio(ids), task.classes)
    assert scores.main.value is not None, "there are segments to score"
    return scores.main.value


@contextmanager
def _sync_if(trained: nn.Module, is_last: bool) -> Iterator[None]:
    """Let processes that train together exchange gradients after the last part of a batch only."""
    if isinstance(trained, nn.parallel.DistributedDataParallel) and not is_last:
        with trained.no_sync():
            yield
    else:
        yield


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


def _write_state(
    path: Path, model: AudioAdaptiveEncoder, optimizer: torch.optim.Optimizer, records: Sequence[EpochRecord]
) -> None:
    state = {
        "model": {name: tensor.detach().cpu() for name, tensor in model.get_trained_tensors().items()},
        "optimizer": optimizer.state_dict(),
        "records": [[r.epoch, dict(r.losses), r.validation] for r in records],
    }
    fresh = path.with_name(f"{path.name}.partial")
    torch.save(state, fresh)
    fresh.replace(path)


def _read_state(path: Path, model: AudioAdaptiveEncoder, optimizer: torch.optim.Optimizer) -> list[EpochRecord]:
    """Load the state of a run that was killed into model and optimizer; return the epochs it had done."""
    if not path.is_file():
        return []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        records = [EpochRecord(epoch, losses, score) for epoch, losses, score in state["records"]]
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise RunError(f"{path} isn't a whole training state: {error}; delete it, the encoder trains anew") from error
    model.load_trained_tensors(state["model"], str(path))
    optimizer.load_state_dict(state["optimizer"])
    return records
