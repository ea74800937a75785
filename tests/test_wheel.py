"""What the audit of a wheel finds; the wheel itself is audited by `make release`."""

import json
import tomllib
import zipfile

import pytest

from tests import wheel
from tests.conftest import ROOT

VERSION = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["package"]["version"]
MAC = "macosx_11_0_arm64"
INFO = f"shallower-{VERSION}.dist-info"


@pytest.fixture(scope="module")
def content():
    """The files of a wheel that is right, without the package."""
    crates = wheel.linked("aarch64-apple-darwin")
    components = [
        {"name": name, "version": number, "licenses": [{"expression": "MIT"}]}
        for name, number in crates
    ]
    licences = {name: (ROOT / name).read_text("utf-8") for name in ("LICENSE", wheel.THIRD_PARTY)}
    return {
        "shallower/_core.abi3.so": "core",
        **dict.fromkeys(wheel.COMPANIONS, ""),
        **{f"{INFO}/licenses/{name}": text for name, text in licences.items()},
        f"{INFO}/sboms/shallower.cyclonedx.json": json.dumps({"components": components}),
    }


def made(folder, content, tags=f"cp311-abi3-{MAC}"):
    path = folder / f"shallower-{VERSION}-{tags}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return path


def test_a_wheel_that_is_right_passes(tmp_path, content, capsys):
    wheel.audit(made(tmp_path, content))
    assert "crates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        (f"cp311-cp311-{MAC}", "is for cp311-cp311"),
        ("cp311-abi3-manylinux_2_34_x86_64", "is for manylinux_2_34_x86_64"),
    ],
)
def test_a_wheel_of_another_name_is_refused(tmp_path, content, tags, words):
    with pytest.raises(AssertionError, match=words):
        wheel.audit(made(tmp_path, content, tags))


def test_a_wheel_of_another_version_is_refused():
    with pytest.raises(AssertionError, match=r"is not of version 9\.9\.9"):
        wheel.target_of(f"shallower-{VERSION}-cp311-abi3-{MAC}.whl", "9.9.9")


@pytest.mark.parametrize(
    "name",
    ["shallower/py.typed", f"{INFO}/licenses/{wheel.THIRD_PARTY}", "shallower/_core.abi3.so"],
)
def test_a_wheel_that_lacks_a_file_is_refused(tmp_path, content, name):
    with pytest.raises(AssertionError, match=r"lacks|has 0 cores"):
        wheel.audit(made(tmp_path, {key: text for key, text in content.items() if key != name}))


def test_a_wheel_that_is_too_large_is_refused(tmp_path, content):
    with pytest.raises(AssertionError, match="allowed are"):
        wheel.audit(made(tmp_path, {**content, "shallower/large": "x" * wheel.MAX_BYTES}))


def test_a_list_of_crates_that_lacks_one_or_its_licence_is_refused():
    wanted = [("rayon", "1.2.3")]
    with pytest.raises(AssertionError, match=r"lacks rayon 1\.2\.3"):
        wheel.check_crates({"components": [{"name": "rayon", "version": "1.2.4"}]}, wanted)
    with pytest.raises(AssertionError, match=r"no licence of rayon 1\.2\.3"):
        wheel.check_crates({"components": [{"name": "rayon", "version": "1.2.3"}]}, wanted)


def test_every_crate_has_its_licence_in_the_repository():
    text = (ROOT / wheel.THIRD_PARTY).read_text(encoding="utf-8")
    for name, number in wheel.linked("all"):
        assert f"\n{name} {number}: " in text, f"{name} {number}: make licences"
