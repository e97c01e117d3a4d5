"""Where the weights of a case come from."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from moe_dist.checkpoint.folder import folder, model_name
from moe_dist.errors import ConfigError
from moe_dist.model.spec import Section, Seed

MOST_LAYERS = 10_000


class SourceSpec(Section):
    """Where weights come from: seeded random ones, or one layer of a checkpoint on disk with its own router."""

    section = "source"

    seed: Seed = 0
    checkpoint: str | None = None
    layer: int | None = Field(default=None, strict=True, ge=0, le=MOST_LAYERS)

    @model_validator(mode="after")
    def _rules(self) -> SourceSpec:
        """Half of a source would be random weights in silence."""
        if self.checkpoint is None:
            if self.layer is not None:
                rule = "is a layer of a checkpoint, and none is given"
                raise ConfigError("source.layer", self.layer, rule, "--checkpoint or source.checkpoint beside it")
            return self
        folder(self.checkpoint, "source.checkpoint")
        if self.layer is None:
            raise ConfigError("source.layer", None, "is needed beside source.checkpoint", "the number of an MoE layer")
        if self.seed:
            raise ConfigError("source.seed", self.seed, "a checkpoint's weights are not drawn", "no source.seed")
        return self

    @property
    def label(self) -> str:
        """In rows and tables, without a machine's paths."""
        if self.checkpoint is None:
            return f"random:{self.seed}"
        return f"checkpoint:{model_name(Path(self.checkpoint))} layer {self.layer}"
