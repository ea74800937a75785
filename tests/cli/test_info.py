"""What a bug report needs of a machine, and that nothing in it is secret."""

import os
import platform
import sys
from pathlib import Path

import pytest

import shallower as sh
from tests.cli.test_program import HEAVY, loaded_by
from tests.commands import in_a_process

SECRET = "hf_" + "aBcDeFgH" * 4


@pytest.fixture
def info(shallower):
    def call():
        return shallower("info", "--json").json

    return call


def test_a_report_has_versions_and_machine(info):
    told = info()
    assert told["python"]["version"] == platform.python_version()
    assert told["packages"]["shallower"] == sh.__version__
    assert told["tiers"][told["tier"]]
    assert told["tiers"]["scalar"]
    assert {"torch", "transformers", "safetensors", "huggingface_hub"} <= told["packages"].keys()
    assert told["platform"] == platform.platform()
    assert told["glibc"] == " ".join(platform.libc_ver())
    assert 1 <= told["cores"]["ours"] <= told["cores"]["all"]
    assert 0 < told["memory"]["free"] < told["memory"]["all"]
    assert told["cache"]["free"] > 0
    assert told["hub"]["free"] > 0


def test_it_says_what_it_can_without_torch():
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from shallower.cli import main\nmain(['info', '--json'])"
    )
    done = in_a_process(sys.executable, "-c", code)
    assert done.status == 0, done.err
    assert done.json["torch_cuda"] is None
    assert done.json["tiers"]["scalar"]


def test_it_imports_nothing_heavy():
    assert not loaded_by("info", "--json") & HEAVY


def test_cards_are_those_of_the_driver(info, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n[ $# = 2 ] && echo 'NVIDIA H100 80GB HBM3, 81559 MiB, 4 MiB, 580.82.07, 9.0'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert info()["cuda_devices"] == [
        {
            "name": "NVIDIA H100 80GB HBM3",
            "memory.total": "81559 MiB",
            "memory.used": "4 MiB",
            "driver_version": "580.82.07",
            "compute_cap": "9.0",
        }
    ]
    program.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert info()["cuda_devices"] == []


def test_nothing_that_is_secret_is_told(shallower, monkeypatch, tmp_path):
    home = tmp_path / "alice"
    home.mkdir()
    for name, value in {
        "HOME": str(home),
        "HF_TOKEN": SECRET,
        "HUGGING_FACE_HUB_TOKEN": SECRET,
        "HF_ENDPOINT": "https://alice:hunter2@hub.example/",
        "RAY_ADDRESS": f"ray://{SECRET}@head:10001",
        "SHALLOWER_CACHE": str(home / "cache"),
        "SHALLOWER_TOKEN": "open sesame",
        "SHALLOWER_DATA": f"/data/{SECRET}/tasks",
        "AWS_SECRET_ACCESS_KEY": "another",
        "OMP_NUM_THREADS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    done = shallower("info", "--json")
    for secret in (SECRET, "hunter2", "open sesame", "another", "alice", "AWS_SECRET"):
        assert secret not in done.out, secret
    told = done.json
    assert told["hub"]["token"] is True
    assert told["cache"]["folder"] == "~/cache"
    variables = told["environment"]
    assert variables["HF_ENDPOINT"] == "https://…@hub.example/"
    assert variables["SHALLOWER_DATA"] == "/data/…/tasks"
    assert variables["OMP_NUM_THREADS"] == "3"


def test_a_token_in_its_file_counts_as_one(info, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert info()["hub"]["token"] is False
    Path(constants.HF_TOKEN_PATH).write_text(SECRET)
    assert info()["hub"]["token"] is True
