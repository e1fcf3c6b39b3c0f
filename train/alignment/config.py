"""The configuration of methods that align modalities or domains: METHODS section 7, each default in one place.

[M] is Munro and Damen's released code (MM-SADA), where Planamente et al. 2021 say nothing; [?] is a choice of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from echoshift.pipeline.errors import PluginError
from echoshift.pipeline.specs import SpecModel
from echoshift.pipeline.suggestions import suggest
from echoshift.train.alignment.outside_methods import find_outside_method, list_outside_methods

METHOD_NAMES = (
    "source_only",
    "rna",
    "hna",
    "align",
    "orth",
    "synchronisation",
    "adabn",
    "mmd",
    "grl",
    "mm_sada",
    "rna_grl",
    "planamente_rerun",
    "yang_rerun",
)
_OWN_PARTS: Mapping[str, Sequence[str]] = {
    "rna": ("rna",),
    "hna": ("hna",),
    "align": ("align",),
    "orth": ("orth",),
    "synchronisation": ("synchronisation",),
    "mmd": ("mmd",),
    "grl": ("grl",),
    "mm_sada": ("synchronisation", "grl"),
    "rna_grl": ("rna", "grl"),
    "planamente_rerun": ("rna", "grl"),
    "yang_rerun": ("grl",),
}
_COMMON_PARTS = ("enabled", "method", "setting", "class_weight", "network", "own", "source")
_ADAPTS = frozenset({"adabn", "mmd", "grl", "mm_sada", "rna_grl", "planamente_rerun", "yang_rerun"})
_OF_ONE_MODALITY = frozenset({"source_only", "adabn", "mmd", "grl"})


class NetworkConfig(SpecModel):
    """What stands on the cached features: a trainable projection a modality, then the classifier.

    A projection is a linear layer of `width` and a ReLU, with BatchNorm after it where `batch_norm`. `fusion` `late`
    sums the logits of two classifiers, `mid` has one classifier of both features side by side. `clips` `one` (the
    paper's): training sees one random clip of a segment, at test each is predicted by itself and probabilities are
    averaged; `mean` averages the cached features of all clips; `each` projects every clip and averages what comes out.
    `modalities` other than `both` are Figure 5's.
    """

    width: int = Field(default=1024, gt=0)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    batch_norm: bool = False
    fusion: Literal["late", "mid"] = "late"
    clips: Literal["one", "mean", "each"] = "one"
    modalities: Literal["both", "visual", "audio"] = "both"

    @model_validator(mode="after")
    def _check_fusion(self) -> NetworkConfig:
        if self.fusion == "mid" and self.modalities != "both":
            raise ValueError("fusion 'mid' needs modalities 'both'")
        return self


class RelativeNormConfig(SpecModel):
    """What RNA weighs; not in the paper, 1 in the family's later code (METHODS 7)."""

    weight: float = Field(default=1.0, ge=0)


class HardNormConfig(SpecModel):
    """What HNA weighs [?], and the norm R: 0 is half-way between those that the first batch shows.

    With SGD of lr 0.01 and momentum 0.9, a weight of 1 diverges for features of a norm above 14.
    """

    weight: float = Field(default=0.01, ge=0)
    norm: float = Field(default=0.0, ge=0)


class CosineConfig(SpecModel):
    """What Align, or Orth, weighs [?]."""

    weight: float = Field(default=1.0, ge=0)


class SynchronisationConfig(SpecModel):
    """What SS weighs and how wide its head's hidden layer is; 5 to 1 of cross-entropy are those of [M]."""

    weight: float = Field(default=5.0, ge=0)
    n_hidden: int = Field(default=100, gt=0)


class DiscrepancyConfig(SpecModel):
    """What MMD weighs, and its kernels exp(-d^2 / gamma), gamma = `gamma` * 2^k for k from `k_first` to `k_last`.

    In [M] the gammas divide; its k are -8, -8 + sqrt(2), ... below 8, ours every whole one (METHODS 7).
    """

    weight: float = Field(default=0.2, ge=0)
    gamma: float = Field(default=9.7, gt=0)
    k_first: int = -8
    k_last: int = 8

    @model_validator(mode="after")
    def _check_order(self) -> DiscrepancyConfig:
        if self.k_first > self.k_last:
            raise ValueError("`k_first` is above `k_last`")
        return self

    @property
    def gammas(self) -> tuple[float, ...]:
        """The kernels' gammas."""
        return tuple(self.gamma * 2.0**k for k in range(self.k_first, self.k_last + 1))


class ReversalConfig(SpecModel):
    """How domains are told apart and gradients reversed: discriminators D -> n_hidden -> 2, one a modality.

    The reversed gradient is (2 / (1 + exp(-10 p)) - 1) * `peak` times the discriminator's, p the share of steps done.
    """

    weight: float = Field(default=1.0, ge=0)
    peak: float = Field(default=0.2, ge=0)
    n_hidden: int = Field(default=100, gt=0)


class AlignmentConfig(SpecModel):
    """Everything that decides a method's loss and network.

    `setting` is what training sees: `dg` the labelled source alone (one or several domains), `uda` the unlabelled
    target too, `supervised` the target's own labelled training split as if it were the source.
    `class_weight` is that of the source's cross-entropy; 0.2 in [M] where the domains are adapted.
    The paper's BatchNorm is `source_only` with `network.batch_norm`.
    `own` and `source` belong to a method from outside: its settings, and where it came from, which is found, not set.
    """

    method: str = "rna"
    setting: Literal["dg", "uda", "supervised"] = "dg"
    class_weight: float = Field(default=1.0, ge=0)
    network: NetworkConfig = NetworkConfig()
    rna: RelativeNormConfig = RelativeNormConfig()
    hna: HardNormConfig = HardNormConfig()
    align: CosineConfig = CosineConfig()
    orth: CosineConfig = CosineConfig()
    synchronisation: SynchronisationConfig = SynchronisationConfig()
    mmd: DiscrepancyConfig = DiscrepancyConfig()
    grl: ReversalConfig = ReversalConfig()
    own: dict[str, Any] = Field(default_factory=dict)
    source: str = ""

    @model_validator(mode="before")
    @classmethod
    def _look_outside(cls, values: Any) -> Any:
        """Complete what a method from outside needs; what a run's name is made of then holds its source."""
        name = values.get("method") if isinstance(values, dict) else None
        outside = find_outside_method(name) if isinstance(name, str) else None
        if outside is None:
            if isinstance(values, dict) and (values.get("own") or values.get("source")):
                raise ValueError("`own` and `source` belong to methods from outside the package")
            return values
        if name in METHOD_NAMES:
            raise PluginError(f"the method {name!r} of {outside.source} has the name of one of echoshift's own")
        return {**values, "own": outside.fill_settings(values.get("own", {})), "source": outside.source}

    @model_serializer(mode="wrap")
    def _describe(self, describe: SerializerFunctionWrapHandler) -> dict[str, Any]:
        described: dict[str, Any] = describe(self)
        if not self.source:  # so that runs of echoshift's own methods keep their names
            del described["own"], described["source"]
        return described

    @field_validator("method")
    @classmethod
    def _check_name(cls, method: str) -> str:
        if method not in METHOD_NAMES:
            names = (*METHOD_NAMES, *list_outside_methods())
            if method in names:
                return method
            hint = suggest(method, names, listed_by="echoshift list methods")
            raise ValueError(f"there is no method {method!r}; {hint}")
        return method

    @model_validator(mode="after")
    def _check_method(self) -> AlignmentConfig:
        method, network = self.method, self.network
        outside = find_outside_method(method) if self.source else None
        if (method in _ADAPTS or (outside is not None and outside.adapts)) and self.setting != "uda":
            raise ValueError(f"method {method} adapts to the target; it needs setting 'uda'")
        if network.modalities != "both" and method in METHOD_NAMES and method not in _OF_ONE_MODALITY:
            raise ValueError(f"method {method} needs modalities 'both'")
        if method == "adabn" and not network.batch_norm:
            raise ValueError("method adabn needs network.batch_norm = true")
        fusion = {"planamente_rerun": "late", "yang_rerun": "mid"}.get(method, network.fusion)
        if network.fusion != fusion:
            raise ValueError(f"method {method} needs network.fusion = {fusion!r}")
        return self


def keep_used(described: Mapping[str, Any]) -> dict[str, Any]:
    """Keep, of an AlignmentConfig as JSON, what its method reads: the common parts and its own, no other method's.

    Whatever names a training or a record by its configuration goes through this, so that a new field of one method
    changes no other method's names.
    """
    method = described["method"]
    parts = _COMMON_PARTS if described.get("source") else (*_COMMON_PARTS, *_OWN_PARTS.get(method, ()))
    return {name: value for name, value in described.items() if name in parts}
