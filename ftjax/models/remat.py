"""What is kept for the backward pass, by config.model.remat."""

import jax

from ftjax.sharding import HOST_MEMORY

# What is kept for the backward pass: all that layers do not make again by themselves; of each layer its input only; the
# same in the memory of the device's host.
_POLICIES = jax.checkpoint_policies
REMAT_POLICIES = {
    "none": None,
    "full": _POLICIES.nothing_saveable,
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst=HOST_MEMORY,
    ),
}
