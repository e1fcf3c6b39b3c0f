"""How long and by which optimiser alignment methods are trained (METHODS section 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from echoshift.pipeline.specs import SpecModel

if TYPE_CHECKING:
    from echoshift.train.cached.training import Schedule


class AlignmentScheduleConfig(SpecModel):
    """How a method is trained, by SGD: `lr` until `lr_drop_step`, then `dropped_lr`.

    A batch has `n_batch` segments; where there is a target, half of them are the target's, as in Munro and Damen's
    code. The score is the mean over the last `n_checkpoints` checkpoints, which are `checkpoint_every` steps apart: the
    paper has 9 and doesn't say how far apart, 50 is Munro and Damen's.
    """

    n_steps: int = Field(default=9000, gt=0)
    n_batch: int = Field(default=128, gt=1)
    lr: float = Field(default=0.01, gt=0)
    lr_drop_step: int = Field(default=3000, ge=0)
    dropped_lr: float = Field(default=0.001, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-7, ge=0)
    n_checkpoints: int = Field(default=9, gt=0)
    checkpoint_every: int = Field(default=50, gt=0)

    @model_validator(mode="after")
    def _check_checkpoints(self) -> AlignmentScheduleConfig:
        if (self.n_checkpoints - 1) * self.checkpoint_every >= self.n_steps:
            raise ValueError("the checkpoints that are averaged begin before the first step; raise n_steps")
        return self

    @property
    def snapshots(self) -> tuple[int, ...]:
        """The numbers of steps after which the averaged predictions are made, but for the last."""
        return tuple(self.n_steps - k * self.checkpoint_every for k in range(self.n_checkpoints - 1, 0, -1))


def plan_schedule(config: AlignmentScheduleConfig, *, has_target: bool) -> Schedule:
    """Make what the loop is told."""
    from echoshift.train.cached.training import Schedule  # brings torch, which a table of what is done needn't wait for

    n_target = config.n_batch // 2 if has_target else 0
    drops = ((config.lr_drop_step, config.dropped_lr),) if config.lr_drop_step < config.n_steps else ()
    return Schedule(
        n_source=config.n_batch - n_target,
        n_target=n_target,
        n_labelled=0,
        n_steps=config.n_steps,
        optimiser="sgd",
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        lr_drops=drops,
        snapshots=config.snapshots,
    )
