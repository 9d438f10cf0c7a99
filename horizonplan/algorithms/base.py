"""What a training method is, for the trainer: a contract of two small classes."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from horizonplan.chain import Chain


class Algorithm(ABC):
    """A way of training a chain that owns its whole step.

    Attributes:
        honours: the trainer's options that act inside a step and that this method takes, of
            ``accumulate``, ``data_parallel``, ``fused``, ``max_grad_norm``, ``nonfinite`` (skipping a step) and
            ``precision``. The trainer refuses the others.
        whole: whether the method sees into the model by itself, so that no blocks need be found: for the trainer the
            chain is the model as one block then.
    """

    honours: ClassVar[frozenset[str]] = frozenset()
    whole: ClassVar[bool] = False

    def prepare(self, chain: Chain, batch: Any) -> nn.Module | None:
        """Make what the method needs on this chain (auxiliary heads); what is returned is trained along."""
        return None

    @abstractmethod
    def step(self, chain: Chain, batch: Any, optimizer: torch.optim.Optimizer) -> Tensor:
        """Train on one batch and return the terminal loss, detached, of shape ``()``."""

    def state_dict(self) -> dict[str, Any]:
        """State besides the model's and the optimiser's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``'s state.

        Raises:
            ValueError: this method has no state of its own, and some is given.
        """
        if state:
            raise ValueError(f"state: {type(self).__name__} keeps no state of its own, got {sorted(state)}.")


class GradientMethod(Algorithm):
    """A method that only differs in the gradient: everything around it comes from the trainer."""

    honours: ClassVar[frozenset[str]] = frozenset(
        {"accumulate", "data_parallel", "fused", "max_grad_norm", "nonfinite", "precision"}
    )

    @abstractmethod
    def backward(self, chain: Chain, batch: Any, scale: float | Tensor = 1.0) -> Tensor:
        """Add ``scale`` times the gradient into ``p.grad``; return the terminal loss, unscaled and detached."""

    def step(self, chain: Chain, batch: Any, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clear the gradients, accumulate this method's, update.

        Raises:
            FloatingPointError: the loss or a gradient (an intermediate loss, then) is not finite; the weights
                are those before the step. Running statistics have seen the batch.
        """
        chain.model.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
        loss = self.backward(chain, batch)
        if wrong := not_finite(loss, gradient_norm(optimizer)):
            chain.model.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"{wrong}: check the data, lower the learning rate or clip; the weights were not updated."
            )
        optimizer.step()
        return loss


class LayerParallel(Algorithm):
    """A method whose processes share the layers, not the samples: each sees every batch and trains blocks of its own.

    Between steps a process has the weights of its own blocks; :meth:`gather` brings them together. One process by
    itself does all of the work, with the same result.

    Attributes:
        time_limit: seconds that a process waits for another one before it gives up.
    """

    time_limit: float

    @abstractmethod
    def gather(self, chain: Chain, optimizer: torch.optim.Optimizer) -> None:
        """Give every process all weights, buffers, optimiser state and state of the method, as one process has them.

        To be called on all processes, before weights are saved or evaluated.
        """


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of all gradients, which shows any that is not finite; 0 where there are none."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


def not_finite(loss: Tensor, norm: Tensor) -> str | None:
    """What is not finite in a step, in words; ``None`` if the loss and the gradient's norm are."""
    if torch.isfinite(loss + 0 * norm):
        return None
    return "a gradient is not finite" if torch.isfinite(loss) else f"loss is {loss.item()}"
