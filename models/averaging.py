"""The average of a network's weights over its last steps, which lies flatter than any of them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """An exponential moving average of all that learns.

    Args:
        num_steps: About how many steps it looks back: an older one weighs a factor e less.
        settle: Makes what depends on the weights fit them, such as batch statistics; called on
            `trained` with the averaged weights in it.

    Source: Polyak & Juditsky 1992, doi:10.1137/0330046; that averages generalise better, and that
    batch statistics are computed anew: Izmailov et al. 2018, arXiv:1803.05407, section 3.2.
    """

    def __init__(
        self, trained: nn.Module, *, num_steps: float, settle: Callable[[], object]
    ) -> None:
        decay = 1 - 1 / max(1.0, num_steps)
        self.model = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._trained = trained
        self._settle = settle

    def update(self) -> None:
        """Take in the weights after a step."""
        self.model.update_parameters(self._trained)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network have the averaged weights for a while."""
        own = deepcopy(self._trained.state_dict())
        self._trained.load_state_dict(self.model.module.state_dict())
        self._settle()
        yield
        self._trained.load_state_dict(own)


def renew_batch_statistics(
    norms: Iterable[nn.modules.batchnorm._BatchNorm],
    run: Callable[[Tensor], object],
    batches: Iterable[Tensor],
) -> None:
    """Replace the running statistics of some batch norms by plain averages over batches.

    `torch.optim.swa_utils.update_bn` does it to every batch norm of a network, also to those whose
    statistics are to stay.

    Args:
        run: Runs the network; it has to be in evaluation mode.
    """
    momenta = {norm: norm.momentum for norm in norms}
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            run(batch)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
        norm.eval()
