"""Every study on a cluster that loses a node has the bytes of one process."""

import pytest

from shallower.sharing.share import KINDS
from tests import test_kills
from tests.conftest import tiny_llama, write_jsonl
from tests.cutting.mixtures import mixture
from tests.documents import documents
from tests.workers.test_ray import cluster as cluster

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

TEXTS = "--texts texts.jsonl --max-length 16 --dtype float32 --batch-size"
EXPERTS = ";".join(f"{layer}:1,4" for layer in range(8))
COMMANDS = {
    "scan": f"scan tiny {TEXTS} 1",
    "scan experts": f"scan mixture {TEXTS} 1 --experts",
    "eval": f"eval tiny {TEXTS} 2 --drop 1:3",
    "eval experts": f"eval mixture {TEXTS} 2 --drop-experts {EXPERTS}",
    "compare": f"compare tiny {TEXTS} 4 --eval-texts held.jsonl --n 1,2 --criteria angular,greedy",
    "compare models": f"compare tiny mixture {TEXTS} 4 --eval-texts held.jsonl --n 1 "
    "--criteria angular,deepest",
    "compare experts": f"compare mixture {TEXTS} 4 --eval-texts held.jsonl --unit experts --n 2 "
    "--criteria frequency,reap,layers",
    "curve": f"curve tiny {TEXTS} 4 --eval-texts held.jsonl --n 1,2 --states cut "
    "--criteria deepest,angular",
}


@pytest.fixture
def given(folder, words):
    """Models and texts in the folder."""
    tiny_llama(4).save_pretrained(folder / "tiny")
    words.save_pretrained(folder / "tiny")
    mixture("mixtral").save_pretrained(folder / "mixture")
    words.save_pretrained(folder / "mixture")
    write_jsonl(folder / "texts.jsonl", documents(80))
    write_jsonl(folder / "held.jsonl", documents(8, seed=1))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_node_that_goes_changes_no_byte(
    shallower, folder, given, cluster, monkeypatch, cache_folder, name
):
    command = COMMANDS[name].split()
    assert shallower(*command, "--out", "alone").status == 0
    monkeypatch.setenv("SHALLOWER_CACHE", f"{cache_folder} on the cluster")
    node, work = cluster.add_node(num_cpus=1, object_store_memory=80 << 20), KINDS[command[0]]
    keep, going = work.keep, [node]

    def keep_and_lose(work, unit, content):
        keep(work, unit, content)
        if going:
            cluster.remove_node(going.pop(), allow_graceful=False)

    monkeypatch.setattr(work, "keep", keep_and_lose)
    done = shallower(*command, "--on", "ray", "--out", "shared")
    assert done.status == 0, done.err
    assert going == []
    monkeypatch.setattr(test_kills, "UNLIKE", {*test_kills.UNLIKE, "command"})
    assert test_kills.unlike(folder / "shared", folder / "alone") == []
