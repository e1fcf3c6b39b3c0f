"""Lists the methods by name, and builds one with the weights that its seed decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from echoshift.pipeline.errors import PluginError
from echoshift.train.alignment.adabn import AdaptiveBatchNorm
from echoshift.train.alignment.align import AngularAlignment
from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.grl import GradientReversal
from echoshift.train.alignment.hna import HardNormAlignment
from echoshift.train.alignment.mm_sada import MultiModalSelfSupervisedAdversarial
from echoshift.train.alignment.mmd import MaximumMeanDiscrepancy
from echoshift.train.alignment.orth import Orthogonality
from echoshift.train.alignment.outside_methods import find_outside_method
from echoshift.train.alignment.planamente_rerun import PlanamenteRerun
from echoshift.train.alignment.rna import RelativeNormAlignment
from echoshift.train.alignment.rna_grl import RelativeNormAlignmentWithReversal
from echoshift.train.alignment.source_only import SourceOnly
from echoshift.train.alignment.synchronisation import Synchronisation
from echoshift.train.alignment.two_streams import StreamShapes
from echoshift.train.alignment.yang_rerun import YangRerun

METHODS: Mapping[str, Callable[[AlignmentConfig, StreamShapes, int], nn.Module]] = MappingProxyType(
    {
        "source_only": SourceOnly,
        "rna": RelativeNormAlignment,
        "hna": HardNormAlignment,
        "align": AngularAlignment,
        "orth": Orthogonality,
        "synchronisation": Synchronisation,
        "adabn": AdaptiveBatchNorm,
        "mmd": MaximumMeanDiscrepancy,
        "grl": GradientReversal,
        "mm_sada": MultiModalSelfSupervisedAdversarial,
        "rna_grl": RelativeNormAlignmentWithReversal,
        "planamente_rerun": PlanamenteRerun,
        "yang_rerun": YangRerun,
    }
)
"""Echoshift's own, by the name that `method` has in a configuration (config.METHOD_NAMES)."""


def build_method(config: AlignmentConfig, shapes: StreamShapes, n_classes: int, seed: int) -> nn.Module:
    """Build the method that a configuration names, a `echoshift.train.cached.batches.Method`, on the CPU.

    The seed alone decides its weights; torch's own generator is left as it is. Streams are drawn first, so that methods
    of one seed begin with the same streams. Raises PluginError where a method from outside can't be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.method in METHODS:
            return METHODS[config.method](config, shapes, n_classes)
        outside = find_outside_method(config.method)
        assert outside is not None, "the configuration refuses a method that nobody has"
        try:
            return outside.build(config, shapes, n_classes)
        except Exception as error:  # a stranger's code may raise anything
            place = f"the method {config.method!r} of {outside.source}"
            raise PluginError(f"{place} can't be built: {type(error).__name__}: {error}") from error
