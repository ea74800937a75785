"""Damage to JSON documents."""

import copy
import tracemalloc

from hypothesis import strategies as st

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-10_000, 10_000)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, 1, -1, "", "angular"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def places(document):
    """Every container of a JSON document with each of its keys."""
    keys = document if isinstance(document, dict) else range(len(document))
    for key in keys:
        yield document, key
        if isinstance(document[key], dict | list):
            yield from places(document[key])


@st.composite
def damaged(draw, document):
    """A JSON document with a few values replaced, removed, or joined by others."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(list(places(document))))
        match draw(st.sampled_from(["replace", "replace", "remove", "join"])):
            case "replace":
                container[key] = draw(JSON)
            case "remove":
                del container[key]
            case "join" if isinstance(container, dict):
                container[draw(st.text(max_size=5))] = draw(JSON)
            case "join":
                container.insert(key, draw(JSON))
        if not list(places(document)):
            break
    return document


def mistyped(document, *optional):
    """A JSON document again and again, each time with one value of another type.

    Args:
        document: It is changed meanwhile.
        optional: Names of values that may be null.
    """
    for container, key in [*places(document)]:
        kept = container[key]
        for other in (None, True, 3, 0.5, "x", [], {}) if kept is not None else ():
            fits = (float, int) if type(kept) is float else type(kept)
            if not (
                isinstance(other, fits) or other == kept or (other is None and key in optional)
            ):
                container[key] = other
                yield document
        container[key] = kept


def peak_memory(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
