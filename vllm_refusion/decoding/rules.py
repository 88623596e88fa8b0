"""The rules of the algorithm's section 3 as functions of numbers: choose, accept, cut.

The state machine's twin and the simulation decide by them. The kernels' form of them is in
``triton_kernels/decisions.py``; the oracle, ``reference.py``, has its own.
"""

from __future__ import annotations

from collections.abc import Sequence


def choose_slots(certainties: Sequence[float], threshold: float) -> list[int]:
    """3.1: indices of the slots to verify; without one that is certain enough, the most certain."""
    chosen = [i for i, certainty in enumerate(certainties) if certainty > threshold]
    if chosen:
        return chosen
    # NaN is below every probability; the first of equals is chosen
    return [max(range(len(certainties)), key=lambda i: max(-1.0, certainties[i]))]


def accepted_run(given: Sequence[float | None], threshold: float) -> int:
    """How many of a slot's tokens are accepted, up to the first that fails its test.

    Args:
        given: the probability that the token before it gives to each; None: it takes no test.
    """
    for count, probability in enumerate(given):
        if probability is not None and not probability > threshold:
            return count
    return len(given)


def until_eos(tokens: Sequence[int], eos: int) -> int:
    """How many tokens there are up to the first EOS, that one included; 0 without one."""
    return tokens.index(eos) + 1 if eos in tokens else 0


def committed_prefix(
    drafts: Sequence[int], runs: Sequence[int], slot_size: int, eos: int
) -> tuple[int, bool]:
    """3.2: how many leading drafts are committed (0: infill follows), whether EOS ends them.

    Args:
        drafts: of the chosen slots, one after another.
        runs: tokens accepted of each slot.
    """
    accepted = 0
    for run in runs:
        accepted += run
        if run < slot_size:
            break
    ending = until_eos(drafts[:accepted], eos)
    return (ending, True) if ending else (accepted // slot_size * slot_size, False)
