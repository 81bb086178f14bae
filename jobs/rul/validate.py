"""Try a checkpoint: can the network be made of it, and is it the one that was validated?

`check` is what `checkpoint.validate` in jobs/rul.yaml names. It loads the weights and their average
into a new network and does the validation of the training script once more; what comes out must be
what the script has logged for the very state that was saved.
"""

from __future__ import annotations

from typing import Any

from jobs.rul.data import DataOutOfReach
from jobs.rul.model import Config, RulNet, averaged
from jobs.rul.train import parameters, prepare, set_up, validate

_WINDOWS = 256


def check(
    components: dict[str, Any], *, params: dict[str, Any], state: dict[str, Any]
) -> dict[str, float] | None:
    """The validation of the average of the weights, and the loss of the weights themselves.

    None where the data that the run began with cannot be had just now. RuntimeError if the saved
    tensors do not fit the network.
    """
    p = parameters()
    set_up(p["seed"])
    config = Config(p["window"], p["cap"], p["hidden"], p["dropout"])
    net = RulNet(config)
    net.load_state_dict(components["model"])
    ema = averaged(net, p["ema_decay"])
    ema.load_state_dict(components["ema"])
    try:
        held_out = prepare(p, state).validation
    except DataOutOfReach:
        return None
    a_few = (held_out[0][:_WINDOWS], held_out[1][:_WINDOWS], held_out[2][:_WINDOWS])
    return {
        **validate(ema.module, held_out, config.cap),
        "weights_loss": validate(net, a_few, config.cap)["val_loss"],
    }
