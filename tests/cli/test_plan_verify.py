"""The command `plan --verify`."""

import pytest

from shallower import ModelSource, Plan, Scan
from shallower.runs.verify import VerificationJob
from shallower.values.tokens import Tokens
from shallower.values.verification import Verified
from tests.cli.documents import documents, tree


@pytest.fixture
def asked(scans, tiny, jsonl):
    return ["plan", scans / "tiny", "--n", 2, "--verify", 3, "--model", tiny, "--texts", jsonl]


def test_it_gives_what_python_gives_with_the_proposals_of_the_scan(shallower, folder, asked, tiny):
    done = shallower(*asked, "--after", "none", "--out", "out", "--json")
    assert done.status == 0, done.err
    found = Verified.from_json(done.json | {"format": "shallower.verified"})
    scanned = Scan.load(asked[1] / "scan.safetensors")
    best = scanned.best_blocks(2, 3)
    job = VerificationJob(
        model=ModelSource(tiny), texts=documents(24), sizes=[2], top=3, after="none",
        max_blocks=1, tokens=Tokens(256, "auto"),
        more={2: [scanned.plan(2), *(Plan.of(6, [block]) for block in best)]},
    )  # fmt: skip
    expected = job.run()[2]
    assert found.to_json() | {"seconds": 0} == expected.to_json() | {"seconds": 0}
    assert found.num_items == 12
    assert all(len(c.plan.blocks) == 1 for c in found.candidates)
    plan = Plan.load(folder / "out" / "shallower_plan.json")
    assert plan == expected.plan
    assert (plan.strategy, plan.metric) == ("search", "verified")
    assert done.json["drop"] == [block.to_json() for block in plan.blocks]


def test_it_tabulates_the_candidates_and_ends_in_a_sentence(shallower, folder, asked):
    done = shallower(*asked, "--blocks", 2)
    assert done.status == 0, done.err
    assert "after a quick patch" in done.out
    assert "best" in done.out
    last = done.out.splitlines()[-1]
    assert " proposals: " in last
    assert "nats a token after a quick patch" in last
    assert tree(folder) == {}
    again = shallower(*asked, "--max-blocks", 2)
    assert again.out == done.out


def test_a_dry_run_loads_no_model(shallower, folder, asked):
    done = shallower(*asked, "--dry-run", "--out", "out")
    assert "would be verified" in done.out
    assert "would write out/shallower_plan.json" in done.out
    assert tree(folder) == {}


def test_another_model_than_the_scanned_is_refused(shallower, asked, models):
    asked[asked.index("--model") + 1] = models / "twin"
    done = shallower(*asked, "--after", "none")
    assert done.status == 2
    assert "is another model" in done.err
    asked[asked.index("--model") + 1] = models / "deeper"
    assert "the plan is for 6 layers" in shallower(*asked, "--after", "none").err


def test_a_card_says_how_a_verified_plan_was_chosen(shallower, folder, asked, tiny):
    assert shallower(*asked, "--after", "none", "--out", "out").status == 0
    assert shallower("prune", tiny, "--plan", "out", "--out", "cut").status == 0
    card = (folder / "cut" / "README.md").read_text()
    assert "of many proposals that a judge has raced, it lost least" in card
    assert "distance" not in card
