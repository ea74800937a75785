"""The disk that a command takes, counted before it works."""

from typing import Any

from ..models.source import ModelSource
from ..settings.studies import CompareSettings, RunSettings
from ..values.files import CHECKPOINT_FOLDER, SMALL


def study_bytes(study: Any) -> int:
    """Count the bytes that a study will write of checkpoints and of all else, at most."""
    if not (copies := _checkpoints(study)):
        return SMALL
    if getattr(study, "gguf", None) is not None:
        return SMALL + int(study.gguf.stat().st_size)
    from ..memory.weights import left_bytes

    sizes = [min(sizes_of(study.settings, one.count_layers())) for one in study.models]
    pairs = zip(study.models, sizes, strict=True)
    places = ((one if isinstance(one, ModelSource) else one.model, n) for one, n in pairs)
    return SMALL + copies * max(left_bytes(*place) for place in places)


def temporary_of(study: Any) -> int:
    """Count the bytes of the temporary files of full patches, at most, about."""
    if not patches(study.settings):
        return 0
    from ..patching.memory import temporary_bytes

    most, sizes = getattr(study.settings, "patch_tokens", None), []
    for one in study.models:
        layers = one.count_layers()
        n = min(filter(None, sizes_of(study.settings, layers)), default=1)
        begin = max(1, (layers - n) // 2)
        how: Any = {"dropped": range(begin, begin + n), "num_tokens": most, "of_run": most is None}
        how["max_length"] = study.settings.tokens.max_length
        model, texts = getattr(one, "model", one), study.splits.values()
        sizes += [temporary_bytes(model, split.fit, **how) for split in texts]
    return max(sizes)


def patches(settings: Any) -> bool:
    """Whether cuts are patched in full."""
    if isinstance(settings, CompareSettings):
        return settings.patch == "full" and {*settings.states} != {"cut"}
    return isinstance(settings, RunSettings) and settings.patch and not settings.plan_only


def _checkpoints(study: Any) -> int:
    """How many checkpoints lie in the folder at once that are not there yet."""
    settings = study.settings
    if isinstance(settings, CompareSettings):  # a cut and the healed one, while that is measured
        return 2 * ("healed" in settings.states)
    if not isinstance(settings, RunSettings):
        return 0
    saved = study.goes_on and (study.folder / CHECKPOINT_FOLDER).exists()
    return (not settings.plan_only and not saved) + bool(settings.heal)


def sizes_of(settings: Any, num_layers: int) -> list[int]:
    """How many layers are to go; where that is not known, the sizes that are looked at."""
    if not isinstance(settings, RunSettings):
        return list(settings.n) or [0]
    from ..judgement.choosing_size import STEPS, curve_sizes

    n, target = settings.target.size(num_layers), settings.target
    if n is not None:
        return [n]
    if target.max_loss is not None:
        return [size for size in STEPS if size < num_layers]
    return curve_sizes(num_layers) if target.is_none else [1]
