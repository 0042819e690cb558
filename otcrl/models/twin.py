"""Another model of the same kind."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from otcrl.models.published import is_split
from otcrl.models.rotary import exact_frequencies

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy. Of a split model a split one whose weights are still to be given (`Learner` does), made on all ranks."""
    if not is_split(model):
        return copy.deepcopy(model)
    made = type(model)._from_config(copy.deepcopy(model.config))
    exact_frequencies(made)
    if model.is_gradient_checkpointing:
        made.gradient_checkpointing_enable()
    return made.train(model.training)
