"""What the workflows may do: zizmor looks for what they should not, this for what they must."""

import re

import pytest
import yaml

from tests import wheel
from tests.conftest import ROOT

FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))
TEXT = (FOLDER / "release.yml").read_text(encoding="utf-8")
RELEASE = yaml.safe_load(TEXT)["jobs"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_may_read_and_nothing_else(file):
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        may = {"id-token": "write"} if name == "publish" else {"contents": "read"}
        assert job["permissions"] == may, name
        assert job["timeout-minutes"] <= 90, name
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False, name


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_an_action_has_its_version_beside_its_hash(file):
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_what_is_published_was_built_tested_and_audited():
    publish = RELEASE["publish"]
    assert set(publish["needs"]) == set(RELEASE) - {"publish"}
    assert "github.event_name == 'push'" in publish["if"]
    assert "startsWith(github.ref, 'refs/tags/v')" in publish["if"]
    assert publish["environment"] == "pypi"
    assert publish["steps"][-1]["with"]["attestations"] is True
    assert "cache" not in TEXT.replace("No job has a cache", "")


def test_every_platform_is_built_and_tested():
    built = {one["name"] for one in RELEASE["wheels"]["strategy"]["matrix"]["include"]}
    tested = {one["name"] for one in RELEASE["test"]["strategy"]["matrix"]["platform"]}
    tested |= {one["name"] for one in RELEASE["test-musl"]["strategy"]["matrix"]["include"]}
    assert built == tested
    assert len(built) == len(wheel.PLATFORMS)
