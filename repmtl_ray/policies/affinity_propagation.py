"""Affinity propagation: clusters around members that the others choose by messages.

Owns the algorithm, with scikit-learn's constants and order of steps, because scikit-learn is no
dependency. Owns no policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 0.5
_MAX_ITERATIONS = 200
_STABLE_ITERATIONS = 50


def clusters_of(similarities: Tensor) -> Tensor | None:
    """The cluster of each item, numbered from 0 in the order of their centres.

    The preference of every item is the median of all similarities. Ties are broken by noise of the
    size of rounding, from the default generator; with few items and symmetric similarities they are
    the rule, and scikit-learn's clusters depend on its seed too.

    Args:
        similarities: [T, T], float64, finite; as they are, also on the diagonal.

    Returns:
        [T] int64, or None if the messages do not settle.

    Source:
        Frey and Dueck, "Clustering by passing messages between data points", Science 315, 2007;
        scikit-learn's form: damping 0.5, at most 200 iterations, settled after 50 equal ones; where
        all similarities are equal, one cluster or one for each item, whichever the preference says.
    """
    num = len(similarities)
    preference = similarities.flatten().quantile(0.5)
    others = similarities[~torch.eye(num, dtype=torch.bool)]
    if bool((others == others[0]).all()):
        alone = bool(preference > others[0])
        return torch.arange(num) if alone else torch.zeros(num, dtype=torch.int64)
    s = similarities.clone()
    s.fill_diagonal_(float(preference))
    eps, tiny = torch.finfo(s.dtype).eps, torch.finfo(s.dtype).tiny
    s += (eps * s + 100 * tiny) * torch.randn(num, num, dtype=s.dtype)
    centres = _settled(s)
    return None if centres is None else _assigned(s, centres)


def _settled(s: Tensor) -> Tensor | None:
    """Indices of the centres, once the messages agree on them."""
    num = len(s)
    responsibilities, availabilities = torch.zeros_like(s), torch.zeros_like(s)
    history: list[Tensor] = []
    for iteration in range(_MAX_ITERATIONS):
        two, places = (availabilities + s).topk(2, dim=1)
        best = two[:, :1].expand(num, num).clone()
        best[torch.arange(num), places[:, 0]] = two[:, 1]
        responsibilities = _DAMPING * responsibilities + (1 - _DAMPING) * (s - best)
        positive = responsibilities.clamp(min=0)
        positive.diagonal().copy_(responsibilities.diagonal())
        new = positive.sum(dim=0) - positive
        own = new.diagonal().clone()
        new = new.clamp(max=0)
        new.diagonal().copy_(own)
        availabilities = _DAMPING * availabilities + (1 - _DAMPING) * new
        is_centre = (availabilities.diagonal() + responsibilities.diagonal()) > 0
        history = [*history[1 - _STABLE_ITERATIONS :], is_centre]
        if iteration >= _STABLE_ITERATIONS and bool(is_centre.any()):
            times = torch.stack(history).sum(dim=0)
            if bool(((times == 0) | (times == _STABLE_ITERATIONS)).all()):
                return is_centre.nonzero().flatten()
    return None


def _assigned(s: Tensor, centres: Tensor) -> Tensor:
    """Clusters around the best centre of each."""
    nearest = _nearest(s, centres)
    for number in range(len(centres)):
        members = (nearest == number).nonzero().flatten()
        within = s[members][:, members].sum(dim=0)
        centres[number] = members[within.argmax()]
    of_item = centres[_nearest(s, centres)]
    return torch.searchsorted(of_item.unique(), of_item)


def _nearest(s: Tensor, centres: Tensor) -> Tensor:
    nearest = s[:, centres].argmax(dim=1)
    nearest[centres] = torch.arange(len(centres))
    return nearest
