"""Makes an audio-adaptive encoder of few weights, and data in memory; as a script it trains as one of several."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.weights.load import resolve_weights
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec, OutputSpec
from echoshift.pipeline.store.interface import ShardIndex
from echoshift.pipeline.store.layout import DONE, plan_shards
from echoshift.pipeline.store.open import create_store
from echoshift.train.ranks import Ranks, join_ranks
from echoshift.train.splits import LabelledSegments
from echoshift.train.stage1.audio import AudioFeatures
from echoshift.train.stage1.clips import ClipFacts
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage1.encoder import AudioAdaptiveEncoder, build_encoder
from echoshift.train.stage1.inputs import list_view_settings
from echoshift.train.stage1.training import EncoderTask, EpochRecord, train_encoder

CLASSES = ("a", "b", "c")
MAP, N_POOLED = (6, 2, 3), 8
CPU = torch.device("cpu")


class Tiny(EncoderNetwork):
    """A network whose outputs are pooled features and logits of them."""

    head_names = ("pooled", "logits")
    classified_output = "pooled"

    def head(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        features = self.features(trunk_outputs)
        return {**features, "logits": self.classifier(features["pooled"])}


class TinyNetwork(Tiny):
    """Two convolutions with the split between them; `normed` adds batch norm, which sees a whole batch."""

    trunk_names = ("trunk",)
    stages = {"stem": ("stem",), "top": ("top",), "classifier": ("classifier",)}  # noqa: RUF012
    split_stage = "top"

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm3d(4) if normed else nn.Identity()
        self.stem = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), norm, nn.ReLU())
        self.top = nn.Sequential(nn.Conv3d(4, 5, 3, padding=1), nn.ReLU())
        self.classifier = nn.Linear(5, 2)

    @property
    def trunk_channels(self) -> dict[str, int]:
        return {"trunk": 4}

    def trunk(self, x: Tensor) -> dict[str, Tensor]:
        return {"trunk": self.stem(x)}

    def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"pooled": self.top(trunk_outputs["trunk"]).float().mean(dim=(2, 3, 4))}


class TinySound(Tiny):
    """A layer on the maps that stores hold, as layer4 is of ResNet-18."""

    trunk_names = ("map",)
    stages = {"stem": ("stem",), "layer4": ("layer4",), "classifier": ("classifier",)}  # noqa: RUF012
    split_stage = "layer4"

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, MAP[0], 3, padding=1)
        self.layer4 = nn.Sequential(nn.Conv2d(MAP[0], N_POOLED, 1), nn.BatchNorm2d(N_POOLED), nn.ReLU())
        self.classifier = nn.Linear(N_POOLED, 2)

    @property
    def trunk_channels(self) -> dict[str, int]:
        return {"map": MAP[0]}

    def trunk(self, x: Tensor) -> dict[str, Tensor]:
        return {"map": self.stem(x)}

    def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"pooled": self.layer4(trunk_outputs["map"]).mean(dim=(2, 3))}


class MemoryInputs:
    """Clips of the shape a network wants, drawn from (segment, epoch): ClipSource without media."""

    def __init__(self, shape: tuple[int, ...] = (3, 2, 6, 6)) -> None:
        self.shape = shape

    def draw(self, segment_id: str, epoch: int) -> Tensor:
        seed = int.from_bytes(f"{segment_id}/{epoch}".encode(), "big") % 2**60
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))

    def iterate_batches(self, batches: Sequence[Sequence[str]], epoch: int) -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            yield {"clip": torch.stack([self.draw(name, epoch) for name in batch])}

    def iterate_clips(
        self, segment_ids: Sequence[str], spec: FeatureSpec
    ) -> Iterator[tuple[str, dict[str, Tensor], ClipFacts]]:
        """Return two clips a segment."""
        for name in segment_ids:
            clips = torch.stack([self.draw(name, -1), self.draw(name, -2)])
            yield name, {"clip": clips}, ClipFacts(np.zeros((2, 2)), np.zeros((2, 2), np.int64), np.zeros(16, np.uint8))

    def close(self) -> None:
        """Have nothing to end."""

    def __enter__(self) -> MemoryInputs:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


@dataclass
class Watcher:
    """Keeps what it is told; `stop_after` epochs it stands for a kill."""

    stop_after: int | None = None
    said: list[str] = field(default_factory=list)

    def start(self, what: str, n_total: int) -> None:
        """Forgets."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Is killed in the middle of the epoch after the last whole one."""
        if self.stop_after is not None and len(self.said) == self.stop_after:
            raise KeyboardInterrupt

    def describe(self, what: str) -> None:
        self.said.append(what)


def name_segments(what: str, n: int) -> list[str]:
    return [f"{what}{i}" for i in range(n)]


def write_sound(
    path: Path,
    ids: Sequence[str],
    maps: np.ndarray | None = None,
    has_audio: np.ndarray | None = None,
    *,
    pooled: np.ndarray | None = None,
    views: np.ndarray | None = None,
    encoder: str = "resnet_demo",
) -> AudioFeatures:
    """Write a store of maps [n, C, F, N] and pooled features, drawn where not given; every fourth row is silent.

    `views` are the maps of further views, [n, k, C, F, N]; their pooled features are 1e6.
    """
    n, rng = len(ids), np.random.default_rng(0)
    maps = rng.standard_normal((n, *MAP)) if maps is None else maps
    pooled = rng.standard_normal((n, N_POOLED)) if pooled is None else pooled
    has_audio = np.arange(n) % 4 != 3 if has_audio is None else has_audio
    n_views = 1 if views is None else 1 + views.shape[1]
    plain = make_feature_spec(
        encoder,
        resolve_weights("random:0", encoder),
        StoreOptions(),
        outputs=("map", "pooled"),
        overrides=list_view_settings(n_views),
    )
    outputs = (OutputSpec(name="map", shape=maps.shape[1:]), OutputSpec(name="pooled", shape=pooled.shape[1:]))
    spec = plain.model_copy(update={"outputs": outputs, "dtype": "float32"})
    order = np.argsort(np.array(ids))
    store = create_store(
        path / f"{encoder}.zarr",
        "tiny",
        spec,
        [ids[i] for i in order],
        n_clips=n_views,
        manifest_sha256="m",
        weights_source="w",
        n_rows_per_shard=n,
    )
    (shard,) = plan_shards(store.layout)
    further = {"map": views, "pooled": np.full((n, n_views - 1, *pooled.shape[1:]), 1e6)}
    for name, values in (("map", maps[:, None]), ("pooled", pooled[:, None])):
        if views is not None:
            values = np.concatenate([values, further[name]], axis=1)
        values = np.where(has_audio.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)
        store.write_outputs(name, 0, values[order].astype(np.float32))
    store.commit_shard(
        shard,
        ShardIndex(
            times=np.zeros((n, n_views, 2)),
            frames=np.zeros((n, n_views, 2), np.int64),
            n_valid=np.full(n, n_views, np.int32),
            digest=np.zeros((n, 16), np.uint8),
            state=np.full(n, DONE, np.uint8),
            has_audio=has_audio[order].astype(np.uint8),
            loudness_dbfs=np.where(has_audio[order], -20, -np.inf).astype(np.float32),
        ),
    )
    return AudioFeatures(store)


def make_config(*, dropout: float = 0.0, **training: Any) -> Stage1Config:
    """Make a configuration of a tiny attention; `dropout` is that of attention, classifier and withheld sound."""
    return Stage1Config.model_validate(
        {
            "visual": {"encoder": "slowfast_demo"},
            "sound": {"encoder": "resnet_demo"},
            "attention": {
                "width": 8, "n_layers": 2, "n_heads": 2, "head_width": 4, "mlp_width": 8,
                "dropout": dropout, "embedding_dropout": dropout, "p_missing": dropout,
            },
            "training": {"n_source": 4, "n_target": 4, "n_labelled": 2, "n_epochs": 4, "trainable_from": "stem",
                         "dropout": dropout, "lr": 1e-2, **training},
        }
    )  # fmt: skip


def label(ids: Sequence[str]) -> LabelledSegments:
    segments = tuple(Segment(name, name, 0.0, 1.0, (CLASSES[i % 3],), "s", "train") for i, name in enumerate(ids))
    return LabelledSegments(segments, np.arange(len(ids)) % 3)


def make_task(n_source: int = 8, n_target: int = 6, n_labelled: int = 0) -> EncoderTask:
    """Make a task of segments s0.., t0.., l0.. and validation v0, v1, v2."""
    source, labelled = label(name_segments("s", n_source)), label(name_segments("l", n_labelled))
    rng = np.random.default_rng(1)
    return EncoderTask(
        source=source,
        source_weights=rng.uniform(0.5, 1.5, n_source).astype(np.float32),
        labelled=labelled,
        labelled_weights=rng.uniform(0.5, 1.5, n_labelled).astype(np.float32),
        target_ids=tuple(name_segments("t", n_target)),
        absent=np.eye(3, dtype=bool)[np.arange(n_target) % 3],
        source_val=label(name_segments("v", 3)),
        validation_spec=make_feature_spec(
            "slowfast_demo", resolve_weights("random:0", "slowfast_demo"), StoreOptions(), outputs=("pooled",)
        ),
        classes=CLASSES,
        absent_weight=0.5,
        multi_label=False,
    )


def list_ids() -> list[str]:
    return [name for what in "stlv" for name in name_segments(what, 12)]


def build(config: Stage1Config, network: str = "plain", seed: int = 0) -> AudioAdaptiveEncoder:
    """Build the encoder on a network: `plain`, `normed`, or one by its name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        own = TinyNetwork(normed=network == "normed") if network in ("plain", "normed") else None
        own = own or find_encoder(network).build()
        sound = TinySound()
    return build_encoder(own, MAP[0], len(CLASSES), config, seed=seed, audio_network=sound, source_domains=("s",))


def train(
    folder: Path,
    config: Stage1Config,
    sound: AudioFeatures,
    *,
    network: str = "plain",
    task: EncoderTask | None = None,
    visual: Any = None,
    watcher: Watcher | None = None,
    ranks: Ranks | None = None,
) -> tuple[AudioAdaptiveEncoder, list[EpochRecord]]:
    """Train an encoder in a folder; return it and its epochs."""
    folder.mkdir(exist_ok=True)
    model = build(config, network)
    records = train_encoder(
        model,
        task or make_task(),
        visual or MemoryInputs(),
        sound,
        config.training,
        folder,
        lr=config.training.lr,
        seed=3,
        device=CPU,
        ranks=ranks or Ranks(),
        watcher=watcher or Watcher(),
        title="tiny",
    )
    return model, records


def main(out: Path, n_source: int) -> None:
    """Train as one of several processes, and write what came of it, losses and tensors."""
    torch.set_num_threads(1)
    with join_ranks() as ranks:
        sound = write_sound(out / f"sound{ranks.rank}", list_ids())
        task = make_task(n_labelled=3)
        model, records = train(out, make_config(n_source=n_source, n_epochs=2), sound, task=task, ranks=ranks)
        tensors = {name: tensor.contiguous() for name, tensor in model.get_trained_tensors().items()}
        save_file(tensors, out / f"rank{ranks.rank}.safetensors")
        (out / f"rank{ranks.rank}.json").write_text(json.dumps([dict(record.losses) for record in records]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
