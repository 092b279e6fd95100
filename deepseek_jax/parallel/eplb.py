"""Where experts should lie, the busiest ones more than once, for measured loads: DeepSeek's EPLB (V3 section 3.4).

A layer's experts get P places, P/n of them on each of n devices, neighbours together. With groups and nodes
(hierarchical): whole groups are dealt to the nodes, each node copies its own busiest experts, and deals what it then
has to its devices. With one group and one node (global) all is dealt over all devices. The places are those of
DeepSeek's published code; of equal loads the first goes first.
"""

import numpy as np
from jaxtyping import Float, Int


def place(
    load_LE: Float[np.ndarray, "L E"], places: int, *, devices: int, nodes: int = 1, groups: int = 1
) -> Int[np.ndarray, "L P"]:
    """The expert in each of the ``places``, layer by layer.

    ValueError where experts, groups, places and devices do not divide as they must.
    """
    _, experts = load_LE.shape
    for what, total, parts, by in (
        ("experts", experts, groups, "groups"),
        ("groups", groups, nodes, "nodes"),
        ("devices", devices, nodes, "nodes"),
        ("places for experts", places, devices, "devices"),
    ):
        if parts < 1 or total % parts:
            near = min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - parts))
            could = f"{-(-total // parts) * parts} can" if by == "devices" and parts > 0 else f"to {near} they can"
            raise ValueError(f"{total} {what} cannot be dealt to {parts} {by}, as many to each; {could}")
    if places < experts:
        raise ValueError(f"{places} places are too few for {experts} experts")
    return np.array([_place(load_E, places, devices, nodes, groups) for load_E in np.asarray(load_LE, np.float64)])


def _place(load_E, places, devices, nodes, groups):
    expert_GX = np.arange(len(load_E)).reshape(groups, -1)
    found = []
    for group_G in _dealt(load_E[expert_GX].sum(axis=1), nodes):
        expert_X = expert_GX[group_G].ravel()
        copy_P = _copied(load_E[expert_X], places // nodes)
        share_P = (load_E[expert_X] / np.bincount(copy_P))[copy_P]
        found += [expert_X[copy_P[place_R]] for place_R in _dealt(share_P, devices // nodes)]
    return np.concatenate(found)


def _dealt(load_N, piles):
    """Item numbers of each pile, as many in each: the heaviest first, each to the lightest pile that has room."""
    size = len(load_N) // piles
    if size == 1:
        return [np.array([i]) for i in range(piles)]
    found: list[list[int]] = [[] for _ in range(piles)]
    weight = np.zeros(piles)
    for item in np.argsort(-load_N, kind="stable"):
        room = np.array([len(pile) < size for pile in found])
        lightest = int(np.argmin(np.where(room, weight, np.inf)))
        found[lightest].append(int(item))
        weight[lightest] += load_N[item]
    return [np.array(pile) for pile in found]


def _copied(load_E, places):
    """Every expert once, then again and again the one whose copies have most to do."""
    found, count_E = list(range(len(load_E))), np.ones(len(load_E))
    while len(found) < places:
        busiest = int(np.argmax(load_E / count_E))
        found.append(busiest)
        count_E[busiest] += 1
    return np.array(found)


def device_loads(
    load_LE: Float[np.ndarray, "L E"], expert_LP: Int[np.ndarray, "L P"], devices: int
) -> Float[np.ndarray, "L N"]:
    """What each of the devices has to do, an expert's load going to its copies in equal parts."""
    count_LE = np.array([np.bincount(expert_P, minlength=load_LE.shape[1]) for expert_P in expert_LP])
    share_LP = np.take_along_axis(load_LE / np.maximum(count_LE, 1), expert_LP, axis=1)
    return share_LP.reshape(len(share_LP), devices, -1).sum(axis=2)
