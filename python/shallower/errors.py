"""Errors that a user can cause, a class for each kind, and the pages that help with them."""

from collections.abc import Iterator
from contextlib import contextmanager

DOCS = "docs/{}.md"
"""Where the pages of the documentation lie."""

PAGES = {
    "cluster": "how-to/share-the-work",
    "criterion": "how-to/add-a-criterion",
    "experts": "how-to/experts",
    "families": "families",
    "gguf": "how-to/gguf",
    "healing": "how-to/heal-a-7b",
    "order": "how-to/prune-heal-quantise",
    "packages": "requirements",
    "streaming": "how-to/scan-a-70b",
}
"""The page that helps with an error, by what it is about."""

_ABOUT = {"ExpertsError": "experts", "MissingExtraError": "packages"}
"""What every error of a kind is about, where that is one thing."""


class ShallowerError(Exception):
    """The base of every error that the user can cause; its text names the way out.

    ``see`` is what it is about, a row of ``PAGES``, where a page helps: ``page`` is that, and a
    traceback names it. Other errors have no page: None.
    """

    def __init__(self, *message: object, see: str | None = None) -> None:
        super().__init__(*message)
        about = see or _ABOUT.get(type(self).__name__)
        self.page = None if about is None else DOCS.format(PAGES[about])
        if self.page is not None:
            self.add_note(f"see {self.page}")


class StatesError(ShallowerError):
    """Hidden states of a wrong shape or dtype, or none that can be compared."""


class MetricError(ShallowerError):
    """A metric that does not exist, or that a scan does not hold."""


class LayersError(ShallowerError):
    """Layers that a model does not have, or cannot do without."""


class ExpertsError(ShallowerError):
    """Experts that a layer does not have, or that its router cannot do without."""


class PositionsError(ShallowerError):
    """Tokens of a text that cannot be chosen."""


class ThreadsError(ShallowerError):
    """A number of threads that cannot be started."""


class TierError(ShallowerError):
    """An instruction tier that does not exist, or that this machine does not have."""


class ScanError(ShallowerError):
    """A scan file that is damaged, scans that cannot be merged, or what a scan does not hold."""


class CostsError(ShallowerError):
    """Costs of blocks that do not fit a model or cannot be compared, or were not measured."""


class CriterionError(ShallowerError):
    """A criterion or a judge that does not exist, is named twice, or has not what it needs."""


class SettingsError(ShallowerError):
    """A setting that does not exist or is out of range, or settings of another study."""


class CacheError(ShallowerError):
    """A store of measurements that cannot be cleared, or an entry that is not what it should be."""


class PlanError(ShallowerError):
    """A plan file that is damaged, or that was made for another model."""


class TextsError(ShallowerError):
    """Texts that are missing, broken or not text."""


class ModelError(ShallowerError):
    """A model that cannot be loaded, read or cut."""


class InMemoryOnlyError(ModelError):
    """A cut that needs the weights in memory: not only whole layers go."""


class RecipeError(ShallowerError):
    """Settings of a healing that are out of range, or do not fit the model."""


class ProcessesError(ShallowerError):
    """Several processes where one is expected, or one of them that ended too early."""


class PatchError(ShallowerError):
    """A cut that cannot be patched, or would not be the better for it."""


class OutputError(ShallowerError):
    """A place that cannot be written to, or that holds something already."""


DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, ShallowerError)
"""What a file of JSON raises that is not what it should be."""


class MissingExtraError(ShallowerError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'shallower[{extra}]'")


MODEL_PACKAGES = ("torch", "transformers", "accelerate", "psutil", "scipy")
"""Packages of the extra ``model``, by the names that they are imported by."""


@contextmanager
def naming_extras(purpose: str, extra: str = "model") -> Iterator[None]:
    """Name the extra to install where the body lacks a package of ``MODEL_PACKAGES``."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in MODEL_PACKAGES:
            raise
        raise MissingExtraError(package, extra, purpose) from error


class RejectedSamplesWarning(UserWarning):
    """Samples were left out of a result; the message counts and names them."""


def one_sentence(error: Exception) -> str:
    """An error in one line, with its kind where it is not one of ours."""
    kind = "" if isinstance(error, ShallowerError) else f"{type(error).__name__}: "
    return kind + why(error)


@contextmanager
def others_go_on(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Note why one of several works has failed, maybe in code from outside; the others continue.

    Of a damaged store, or a folder that cannot be written to, all would fail.
    """
    try:
        yield
    except (CacheError, OutputError):
        raise
    except Exception as error:
        failed[name] = one_sentence(error)


MOST_WORDS = 400
"""Letters of another package's error that are shown; it may hold whole files or configs."""


def why(error: BaseException, path: object = None) -> str:
    """The text of an error, on one line, for the end of a sentence that names ``path``.

    Of the system's own it is their words, without a number, and the file where that is another. Of
    long ones it is the first whole sentences.
    """
    if isinstance(error, OSError) and error.strerror:
        words = error.strerror[:1].lower() + error.strerror[1:]
        file = error.filename
        return words if file is None or str(file) == str(path) else f"{words}: {file}"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    text = " ".join(str(error).split())
    if len(text) <= MOST_WORDS or isinstance(error, ShallowerError):
        return text or type(error).__name__
    whole = text.rfind(". ", 0, MOST_WORDS)
    return text[: whole + 1] if whole > 0 else f"{text[: text.rfind(' ', 0, MOST_WORDS)]} …"


@contextmanager
def raise_output_error(path: object) -> Iterator[None]:
    """Turn an OSError or a ValueError of the body into an OutputError that names the path."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {why(error, path)}") from error
