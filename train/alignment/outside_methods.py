"""Finds methods of other distributions by their entry points, and checks that each is what the loop trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from echoshift.pipeline.errors import PluginError
from echoshift.pipeline.plugins import METHOD_GROUP, list_plugin_names, load_plugin
from echoshift.pipeline.specs import SpecModel

if TYPE_CHECKING:
    from torch import nn

_PARTS = ("loss_names", "losses", "predict")


@dataclass(frozen=True, slots=True)
class OutsideMethod:
    """A method from outside the package.

    Attributes:
        build: makes it of (AlignmentConfig, StreamShapes, n_classes), as echoshift's own are made.
        settings: of its own, the class attribute `Settings`; None: it has none.
        adapts: whether it needs the unlabelled target, the class attribute `adapts`.
        source: the distribution it came from; part of what names a run.
    """

    build: Callable[..., nn.Module]
    settings: type[SpecModel] | None
    adapts: bool
    source: str

    def fill_settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all its settings as JSON, defaults included; raises ValueError naming what isn't one of them."""
        if self.settings is None:
            if given:
                raise ValueError(f"own: the method has no settings of its own, such as {next(iter(given))!r}")
            return {}
        try:
            return self.settings.model_validate(given).model_dump(mode="json")
        except ValidationError as error:
            faults = [f"own.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            there = ", ".join(self.settings.model_fields)
            raise ValueError(f"{'; '.join(faults)}; it has {there}") from error


def list_outside_methods() -> tuple[str, ...]:
    """List the names of methods from outside; run none of their code."""
    return list_plugin_names(METHOD_GROUP)


def find_outside_method(name: str) -> OutsideMethod | None:
    """Find a method from outside, None where no distribution has it; raises PluginError where it isn't sound."""
    plugin = load_plugin(METHOD_GROUP, name)
    if plugin is None:
        return None
    from torch import nn

    found, place = plugin.found, f"the method {name!r} of {plugin.source}"
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        kind = found.__name__ if isinstance(found, type) else type(found).__name__
        raise PluginError(f"{place} is a {kind}; a method's entry point names a class derived from torch.nn.Module")
    missing = [part for part in _PARTS if not hasattr(found, part)]
    if missing:
        raise PluginError(f"{place} lacks {', '.join(missing)} (train/cached/batches.py, Method)")
    settings = getattr(found, "Settings", None)
    if settings is not None and not (isinstance(settings, type) and issubclass(settings, SpecModel)):
        raise PluginError(f"{place}: Settings must derive from echoshift.pipeline.specs.SpecModel")
    return OutsideMethod(found, settings, bool(getattr(found, "adapts", False)), plugin.source)
