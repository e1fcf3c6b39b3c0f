"""The encoders that there are, with their default preprocessing, outputs and builders; imports no torch.

An encoder is one module with an EncoderEntry: any file of this folder, or a module of another distribution that names
its entry by an entry point of the group `echoshift.encoders` (docs/adding-an-encoder.md).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from echoshift.extract import encoders
from echoshift.pipeline.errors import PluginError, SpecError, suggest
from echoshift.pipeline.plugins import ENCODER_GROUP, list_plugin_names, load_plugin
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec

if TYPE_CHECKING:
    from torch import nn

Shapes = dict[str, tuple[int, ...]]

_NO_ENCODERS = ("registry", "network", "inference_form")  # the files of this folder that encoders are made with


@dataclass(frozen=True, slots=True)
class EncoderEntry:
    """One encoder.

    Attributes:
        name: as written in configs, and the name that weights are made for.
        modality: what it sees or hears.
        revision: raised when its numerics change; part of the fingerprint.
        clip, frame, audio: the default preprocessing, METHODS 2 (Stage-2 test) and 3; exactly one of frame and audio.
            For an audio encoder the clip says what `span="clip"` centres on.
        default_outputs: what is stored when nothing is asked for.
        build: builds the whole network with default initialisation: an EncoderNetwork (network.py), or for extraction
            alone any module whose forward takes [B, C, T, H, W] or [B, 1, F, N] and returns [B, D] or named tensors.
        output_shapes: computes every output's shape for one clip.
        default_weights: the reference used when none is named and the catalogue has none for this encoder.
        source: of an encoder from outside, the distribution it came from; set when it is found, not by its author.
    """

    name: str
    modality: Literal["rgb", "flow", "audio"]
    revision: int
    clip: ClipSpec
    build: Callable[[], nn.Module]
    output_shapes: Callable[[ClipSpec, FrameSpec | AudioSpec], Shapes]
    frame: FrameSpec | None = None
    audio: AudioSpec | None = None
    default_outputs: tuple[str, ...] = ("pooled",)
    default_weights: str = ""
    source: str = ""

    @property
    def spec(self) -> FrameSpec | AudioSpec:
        """The default preprocessing of frames or of audio."""
        spec = self.frame or self.audio
        assert spec is not None, "checked when the encoder is found"
        return spec


def is_trunk_output(name: str) -> bool:
    """Return whether an output is the trunk's: `map`, or one whose name begins with `trunk`."""
    return name.startswith("trunk") or name == "map"


@cache
def list_builtin_encoders() -> Mapping[str, EncoderEntry]:
    """List echoshift's own encoders by name: the ENTRY or the ENTRIES of every module of this folder."""
    found: dict[str, EncoderEntry] = {}
    for info in pkgutil.iter_modules(encoders.__path__):
        if info.name in _NO_ENCODERS:
            continue
        module = importlib.import_module(f"{encoders.__name__}.{info.name}")
        place = f"extract/encoders/{info.name}.py"
        entries = getattr(module, "ENTRIES", None) or (getattr(module, "ENTRY", None),)
        for entry in entries:
            if not isinstance(entry, EncoderEntry):
                raise PluginError(f"{place} needs an EncoderEntry in ENTRY, or several in ENTRIES")
            _check_entry(entry, place)
            if entry.name in found:
                raise PluginError(f"{place}: the name {entry.name!r} is taken; take another")
            found[entry.name] = entry
    return MappingProxyType(found)


def list_encoders() -> Mapping[str, EncoderEntry]:
    """List all encoders by name, echoshift's own first; raises PluginError where one from outside is faulty."""
    outside = {name: find_encoder(name) for name in list_plugin_names(ENCODER_GROUP)}
    return {**list_builtin_encoders(), **outside}


def find_encoder(name: str) -> EncoderEntry:
    """Find an encoder by name, echoshift's own or one from outside.

    Raises SpecError with the nearest name, or with all of them; PluginError where the one from outside is faulty.
    """
    builtin = list_builtin_encoders()
    plugin = load_plugin(ENCODER_GROUP, name)
    if plugin is None:
        if name not in builtin:
            hint = suggest(name, (*builtin, *list_plugin_names(ENCODER_GROUP)), listed_by="echoshift list encoders")
            raise SpecError(f"there is no encoder {name!r}; {hint}")
        return builtin[name]
    entry = plugin.found
    if not isinstance(entry, EncoderEntry):
        raise PluginError(
            f"{plugin.source} is a {type(entry).__name__}; an encoder's entry point names an EncoderEntry"
        )
    place = f"the encoder {name!r} of {plugin.source}"
    if name in builtin:
        raise PluginError(f"{place} has the name of one of echoshift's own; take another")
    if entry.name != name:
        raise PluginError(f"{place} calls itself {entry.name!r}; entry point and EncoderEntry need one name")
    _check_entry(entry, place)
    return replace(entry, build=partial(_build, entry, place), source=plugin.source)


def _check_entry(entry: EncoderEntry, place: str) -> None:
    """Raise PluginError where an entry contradicts itself."""
    modality = "audio" if entry.frame is None else entry.frame.input
    if (entry.frame is None) == (entry.audio is None) or entry.modality != modality:
        raise PluginError(
            f"{place} needs a `frame` for rgb or flow, or an `audio`, as its modality {entry.modality!r} says"
        )
    try:
        shapes = entry.output_shapes(entry.clip, entry.spec)
    except Exception as error:  # a stranger's code may raise anything
        raise PluginError(f"{place} can't plan its outputs: {type(error).__name__}: {error}") from error
    missing = set(entry.default_outputs) - set(shapes)
    if missing or not entry.default_outputs:
        names = ", ".join(sorted(missing)) or "(it has none)"
        raise PluginError(f"{place} plans no shape for its default outputs {names}")


def _build(entry: EncoderEntry, place: str) -> nn.Module:
    """Build the network of an encoder from outside; raises PluginError where it isn't one."""
    from torch import nn

    try:
        network = entry.build()
    except Exception as error:  # a stranger's code may raise anything
        raise PluginError(f"{place} can't be built: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise PluginError(f"{place} builds a {type(network).__name__}; it must be a torch.nn.Module")
    return network
