"""Planned caches as ``hasten.tune`` makes them, for every number of computed steps that ``peers.py`` asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hasten import fit_weights, speed_up
from hasten.costs import Gram, Watch, moves, plans, refined
from hasten.speed.host import host

COMPUTED = (25, 20, 16, 13, 11, 10, 9, 8, 7, 6, 5, 4)


def planned(learn: Any, steps: int, call: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(sweep, point, fields of Cache) of plans made on the requests ``learn``: by a line, and by fitted weights."""
    watch = Watch()
    whole = lambda pipe: learn.draw(slice(None))  # noqa: E731
    with speed_up(learn.pipe, watch, call=call) as pipe:
        whole(pipe)
    gram, at = Gram.of(watch.traces), host(learn.pipe, call)
    assert at.path is not None and at.kind is not None
    gram = Gram(gram.products[:steps, :steps], gram.times)  # every step is guided or none is, as the peers do it
    feel = moves(watch.traces[0], at.path, at.kind)
    found = {p.units: p for p in plans(gram, feel, warmup=1)}
    for count in COMPUTED:
        if count not in found:
            continue
        (line,) = refined(gram, feel, found[count], warmup=1).cache()
        fitted = fit_weights(learn.pipe, line.mask, [whole], call=call)
        for name, fields in (("line", {"mask": line.mask, "degree": 1}), ("fitted", fitted)):
            yield f"schedule, planned, {name}", f"{count} computed", {"policy": "schedule", **fields}
