"""``shallower info``: the versions of a result's makers, and the instructions of the core."""

from .options import Json
from .output import print_json, show


def info_command(*, as_json: Json = False) -> None:
    """Show the core's instruction tiers and the packages' versions.

    The tier in use is the best that this processor has; SHALLOWER_TIER forces another.
    """
    from .._core import tier, tiers
    from ..values.provenance import versions

    used, known = tier(), dict(tiers())
    packages = versions()
    if as_json:
        print_json({"tier": used, "tiers": known, "packages": packages})
        return
    show(
        f"tier {used} of {', '.join(name for name, there in known.items() if there)}; "
        f"not here: {', '.join(name for name, there in known.items() if not there) or 'none'}",
        *(f"{name} {version}" for name, version in packages.items()),
    )
