"""A callback that has `Trainer` log what the routers choose in training."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from transformers.trainer_callback import TrainerCallback

from .activity import RouterCounts, load_of_busiest, relative_entropy

if TYPE_CHECKING:  # half a second to import
    from transformers import Trainer


class RouterStatistics(TrainerCallback):
    """Has `Trainer` log, beside each training loss, what the routers have chosen since the last one.

    All values are means over layers, and count the tokens of all processes:

        router/load              the choices of the busiest expert divided by an even share; 1 is even
        router/device_load       the same for devices, the groups of experts
        router/device_traffic    the same for the tokens that are sent to a device
        router/devices_per_token the number of devices that a token is sent to
        router/entropy           the entropy of the experts' shares divided by that of even shares
        router/unused            the number of experts that were never chosen
        router/dropped           the share of choices that were dropped

    `router/load_of_worst_layer` is the greatest load of any layer.

    Use: trainer.add_callback(RouterStatistics(trainer)). Raises TypeError for anything but a `Trainer`.
    """

    def __init__(self, trainer: "Trainer"):
        if not hasattr(trainer, "callback_handler"):
            raise TypeError(f"expected the Trainer that is to log these values, got {type(trainer).__name__}.")
        self.trainer = trainer
        self._watching = ExitStack()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # an earlier training may have ended with an error
        self._watching.close()
        self.counts = RouterCounts(model)
        self._watching.enter_context(self.counts.watching(only_training=True))

    def on_train_end(self, args, state, control, **kwargs):
        self._watching.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        # our own call of log re-enters this callback
        if "loss" not in logs:
            return
        self.trainer.log(self.figures())
        self.counts.reset()

    def figures(self) -> dict[str, float]:
        counts = self.counts
        total = self.trainer.accelerator.reduce(counts.sums)
        choices, _, sent, dropped = total.split(counts.widths, dim=1)
        num_choices = choices.sum(dim=1).clamp(min=1)
        shares = choices / num_choices[:, None]
        num_tokens = num_choices / counts.num_experts_per_tok
        load, device_shares = load_of_busiest(shares), shares.unflatten(1, (sent.shape[1], -1)).sum(dim=-1)
        values = {
            "load": load,
            "device_load": load_of_busiest(device_shares),
            "device_traffic": load_of_busiest(sent / sent.sum(dim=1, keepdim=True).clamp(min=1)),
            "devices_per_token": sent.sum(dim=1) / num_tokens,
            "entropy": relative_entropy(shares),
            "unused": (choices == 0).sum(dim=1),
            "dropped": dropped[:, 0] / num_choices,
        }
        figures = {f"router/{name}": per_layer.double().mean().item() for name, per_layer in values.items()}
        return figures | {"router/load_of_worst_layer": load.max().item()}
