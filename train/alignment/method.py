"""The base of methods that align modalities or domains, and the registry that finds them, built in or from outside.

Nothing here imports torch, nor does a built-in method's file before it computes: a table of runs reads what a method
declares, and needn't wait for torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from echoshift.pipeline.errors import PluginError
from echoshift.pipeline.plugins import METHOD_GROUP, list_plugin_names, load_plugin
from echoshift.pipeline.specs import SpecModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from echoshift.train.alignment.config import AlignmentConfig
    from echoshift.train.alignment.two_streams import StreamFeatures, TwoStreams
    from echoshift.train.features import FeatureShapes
    from echoshift.train.loop import StepInputs

    _Module = nn.Module
else:
    _Module = object  # `build_method` adds nn.Module

_PARTS = ("loss_names", "losses", "predict")


class AlignmentMethod(_Module):
    """A method: the two streams of `two_streams.TwoStreamNetwork`, heads of its own, and terms of the loss.

    A subclass declares the attributes below and computes its terms. Built, it is an nn.Module with `config`,
    `settings`, `streams`, `losses` and `predict`.

    Attributes:
        Settings: the method's own settings, `settings` once it is built. Those of the first methods are parts of
            AlignmentConfig, such as `alignment.rna`; any other's are `alignment.own`.
        reads: the parts of AlignmentConfig that a built-in method reads, its own among them.
        adapts: it needs the unlabelled target, setting `uda`.
        modalities, fusion, batch_norm: what `alignment.network` may be.
        domain_statistics: BatchNorm keeps running statistics for each domain.
        loss_names: the terms, `class` first.
    """

    Settings: ClassVar[type[SpecModel]] = SpecModel
    reads: ClassVar[tuple[str, ...]] = ()
    adapts: ClassVar[bool] = False
    modalities: ClassVar[tuple[str, ...]] = ("both",)
    fusion: ClassVar[tuple[str, ...]] = ("late", "mid")
    batch_norm: ClassVar[tuple[bool, ...]] = (False, True)
    domain_statistics: ClassVar[bool] = False
    loss_names: ClassVar[tuple[str, ...]]

    if TYPE_CHECKING:
        config: AlignmentConfig
        settings: Any
        streams: TwoStreams

    def add_heads(self) -> None:
        """Add modules and buffers to the streams, whose weights are drawn already."""

    def encode(self, step: StepInputs) -> tuple[StreamFeatures, StreamFeatures | None]:
        """Compute the features of a step's source and, where there is one, of its target."""
        return self.streams.encode_step(step)

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> dict[str, Tensor]:
        """Compute the weighted terms beside the class loss; one that is left out is 0."""
        return {}


@dataclass(frozen=True, slots=True)
class FoundMethod:
    """A method that the registry found.

    Attributes:
        kind: an AlignmentMethod, or any nn.Module with `loss_names`, `losses` and `predict` that is built of
            (AlignmentConfig, FeatureShapes, n_classes).
        source: the distribution from outside that it came from; "" where it is built in.
    """

    name: str
    kind: type[Any]
    source: str = ""

    @property
    def title(self) -> str:
        """Name it in errors."""
        return f"the method {self.name!r} of {self.source or 'echoshift'}"

    @property
    def reads(self) -> tuple[str, ...]:
        """The parts of the configuration that it reads beside the common ones."""
        return getattr(self.kind, "reads", ())

    @property
    def settings(self) -> type[SpecModel] | None:
        """What `alignment.own` is; None where the method has no such settings."""
        from echoshift.train.alignment.config import AlignmentConfig

        settings: type[SpecModel] | None = getattr(self.kind, "Settings", None)
        parts = [field.annotation for field in AlignmentConfig.model_fields.values()]
        return None if settings is None or settings in parts or not settings.model_fields else settings

    @property
    def adapts(self) -> bool:
        """Whether it needs the unlabelled target."""
        return bool(getattr(self.kind, "adapts", False))

    @property
    def allowed(self) -> Mapping[str, tuple[Any, ...]]:
        """What fields of `alignment.network` may be."""
        if not issubclass(self.kind, AlignmentMethod):
            return {}
        return {name: getattr(self.kind, name) for name in ("modalities", "fusion", "batch_norm")}

    def fill_settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all of `alignment.own` as JSON, defaults included; raises ValueError naming what isn't one of them."""
        if self.settings is None:
            if given:
                there = f"; it reads alignment.{', alignment.'.join(self.reads)}" if self.reads else ""
                raise ValueError(f"own: {self.title} has no settings of its own, such as {next(iter(given))!r}{there}")
            return {}
        try:
            return self.settings.model_validate(given).model_dump(mode="json")
        except ValidationError as error:
            faults = [f"own.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            there = ", ".join(self.settings.model_fields)
            raise ValueError(f"{'; '.join(faults)}; it has {there}") from error


def list_methods() -> tuple[str, ...]:
    """List the names of all methods, built in and from outside; run none of the latter's code."""
    return (*list_builtin(), *list_plugin_names(METHOD_GROUP))


@cache
def list_builtin() -> tuple[str, ...]:
    """List the names of echoshift's own methods, the names of their files."""
    from echoshift.train.alignment import methods

    return tuple(sorted(module.name for module in pkgutil.iter_modules(methods.__path__)))


def find_method(name: str) -> FoundMethod | None:
    """Find a method, None where nobody has it; raises PluginError where one from outside isn't sound, or takes a name.

    One from outside is what its entry point names.
    """
    plugin = load_plugin(METHOD_GROUP, name)
    if name in list_builtin():
        if plugin is not None:
            raise PluginError(f"the method {name!r} of {plugin.source} has the name of one of echoshift's own")
        return load_builtin(name)
    if plugin is None:
        return None
    found = FoundMethod(name, plugin.found, plugin.source)
    _check(found)
    return found


@cache
def load_builtin(name: str) -> FoundMethod:
    """Load a method of echoshift itself, the AlignmentMethod in the file of its name."""
    module = importlib.import_module(f"echoshift.train.alignment.methods.{name}")
    [kind] = [
        found
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, AlignmentMethod) and found.__module__ == module.__name__
    ]
    return FoundMethod(name, kind)


def _check(found: FoundMethod) -> None:
    from torch import nn

    kind = found.kind
    if not (isinstance(kind, type) and issubclass(kind, AlignmentMethod | nn.Module)):
        named = kind.__name__ if isinstance(kind, type) else type(kind).__name__
        raise PluginError(
            f"{found.title} is a {named}; a method's entry point names a class derived from AlignmentMethod or "
            f"torch.nn.Module"
        )
    parts = ("loss_names",) if issubclass(kind, AlignmentMethod) else _PARTS
    missing = [part for part in parts if not hasattr(kind, part)]
    if missing:
        raise PluginError(f"{found.title} lacks {', '.join(missing)} (docs/adding-a-method.md)")
    settings = getattr(kind, "Settings", None)
    if settings is not None and not (isinstance(settings, type) and issubclass(settings, SpecModel)):
        raise PluginError(f"{found.title}: Settings must derive from echoshift.pipeline.specs.SpecModel")


def build_method(config: AlignmentConfig, shapes: FeatureShapes, n_classes: int, seed: int) -> nn.Module:
    """Build the method that a configuration names, a `loop.Method`, on the CPU.

    The seed alone decides its weights; torch's own generator is left as it is. Streams are drawn first, so that methods
    of one seed begin with the same streams. Raises PluginError where a method from outside can't be built.
    """
    import torch

    from echoshift.train.alignment.two_streams import TwoStreamNetwork

    found = find_method(config.method)
    assert found is not None, "the configuration refuses a method that nobody has"
    kind = found.kind
    if issubclass(kind, AlignmentMethod):
        kind = type(kind.__name__, (kind, TwoStreamNetwork), {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            built: nn.Module = kind(config, shapes, n_classes)
        except Exception as error:
            if not found.source:
                raise
            # A stranger's code may raise anything.
            raise PluginError(f"{found.title} can't be built: {type(error).__name__}: {error}") from error
    return built


def compute_masked_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Compute the mean of float [B] over the rows where bool [B] counts, float32 []; 0 where none does."""
    weights = counted.float()
    return (values.float() * weights).sum() / weights.sum().clamp(min=1)


def compute_mean_norm(features: Tensor, counted: Tensor) -> Tensor:
    """Compute the mean L2 norm of [B, D] over the rows that count, float32 []; 0 where none does.

    It is the mean of h in Planamente et al., Eq. 1; the gradient of a row of zeros is zero.
    """
    import torch

    return compute_masked_mean(torch.linalg.vector_norm(features.float(), dim=-1), counted)
