"""How often a pass over the examples takes each of them, by its source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finhpc.data.examples.records import split_name
from finhpc.data.examples.schema import FORMATS
from finhpc.data.shards.order import Ints, permutation
from finhpc.errors import ConfigError
from finhpc.settings.finetune import Instructions


def check_weights(settings: Instructions) -> list[float]:
    """Return the weight of each source in `data.source`, 1 if `data.weights` does not name it.

    Raises `ConfigError` with every name that is not one source's, and if there is a temperature as well.
    """
    problems, found = [], [1.0] * len(settings.source)
    names = [_names(source) for source in settings.source]
    for name, weight in settings.weights.items():
        places = [i for i, own in enumerate(names) if name in own]
        if len(places) != 1:
            what = "is no source" if not places else f"names {len(places)} sources"
            problems.append(
                f"data.weights: {name} {what}; the sources are {', '.join(settings.source) or 'not given'}: write the "
                "name or the path of one of them."
            )
            continue
        found[places[0]] = weight
    if settings.weights and settings.temperature != 1:
        problems.append(
            f"data.weights and data.temperature={settings.temperature:g} both set the shares of sources; leave one out."
        )
    if problems:
        raise ConfigError(problems)
    return found


def _names(source: str) -> set[str]:
    path, _ = split_name(source, FORMATS)
    return {source, path, Path(source).name, Path(path).name}


def mixed(sources: Ints, weights: Sequence[float], temperature: float, seed: int) -> Ints:
    """Return the indices of the examples in one pass, in their order; `sources`: the number of each one's source.

    An example with weight 2.5 is taken twice, and half of those of its source a third time: which, `seed` decides. With
    a temperature T a source of n examples has n^(1/T) of them in a pass over the same of the largest, which is as it is
    (N. Arivazhagan et al., "Massively Multilingual Neural Machine Translation in the Wild", 2019, section 4.1).
    Raises `ConfigError` if a weight leaves none of a source.
    """
    counts = np.bincount(sources, minlength=len(weights))
    times = [float(weight) for weight in weights]
    if temperature != 1:
        times = [float(counts.max() / max(1, count)) ** (1 - 1 / temperature) for count in counts]
    parts = []
    for number, (count, weight) in enumerate(zip(counts.tolist(), times, strict=True)):
        whole, more = divmod(round(count * weight), max(1, count))
        if count and not whole and not more:
            raise ConfigError(
                f"data.weights: {weight:g} leaves none of the {count} examples of a source; use a larger one."
            )
        own = np.flatnonzero(sources == number)
        parts += [own] * whole + [own[permutation(count, 5, seed, number)[:more]]] * (more > 0)
    return np.sort(np.concatenate(parts))
