"""The reference policy: the model as it was before training, without a second copy of what is frozen.

It is the initial value of everything that is trained, laid over the same frozen parameters. So it is right for every
way to train: fresh adapters of any kind, adapters gone on from, modules trained whole, full fine-tuning. Switching the
adapter off instead would compare an adapter that training went on from with the wrong model.
"""

from ftjax import tree
from ftjax.tree import Tree

REFERENCE = "reference"  # the collection of initial values; none is needed where they change nothing

TEACHER = "teacher"  # the collection of another model that the policy learns from, with its own params

MOVING = "moving_reference"  # in the collection `kept`: a reference that follows the policy


def frozen_with_reference(frozen: Tree, initial: Tree) -> Tree:
    """`frozen`, and beside it the initial values of what is trained; a head has no part in what the model says."""
    return frozen | {REFERENCE: {name: part for name, part in initial.items() if name != "heads"}}


def policy_and_reference(variables: Tree) -> tuple[Tree, Tree]:
    """The variables of the model in training and of the reference.

    Without a REFERENCE collection the reference is the base without its adapters: what fresh LoRA begins as, since its
    B is zero (Hu et al. 2021, section 4.1).
    """
    policy = {name: part for name, part in variables.items() if name not in (REFERENCE, TEACHER)}
    if REFERENCE not in variables:
        return policy, {name: part for name, part in policy.items() if name != "lora"}
    return policy, _overlaid(policy, variables[REFERENCE])


def policy_and_moving_reference(variables: Tree) -> tuple[Tree, Tree]:
    """The same where the reference may follow the policy (`training.state.moving_reference`), as objectives see it."""
    policy, reference = policy_and_reference(variables)
    moving = policy.get("kept", {}).get(MOVING)
    return policy, reference if moving is None else _overlaid(policy, moving)


def _overlaid(policy: Tree, values: Tree) -> Tree:
    return tree.unflatten(tree.flatten(policy) | tree.flatten(values))
