"""Pushing to a hub: what arrives there, and what is refused before any work."""

import pytest
from huggingface_hub import constants

import shallower as sh
from shallower.runs.push import Push
from tests.hub import TOKEN
from tests.hub import hub as hub

# By huggingface_hub, of its own way to hand a file to httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


@pytest.fixture
def folder(tmp_path):
    """A folder as a cut leaves it."""
    made = tmp_path / "cut"
    (made / "deeper").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 400)
    (made / "config.json").write_text('{"num_hidden_layers": 2}')
    (made / "README.md").write_text("---\nbase_model: some/model\n---\n# cut\n")
    (made / "deeper" / "plan.json").write_text("{}")
    return made


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_all_bytes_arrive_in_one_commit_and_the_address_is_given(hub, folder, capfd):
    before = files_of(folder)
    assert sh.push(folder, "me/cut") == f"{hub.url}/me/cut"
    assert hub.repos == {"me/cut": before}
    assert hub.commits == ["Push cut by shallower"]
    assert not hub.private["me/cut"]
    assert files_of(folder) == before
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(",")[0] for line in err.splitlines()] == [
        "push to me/cut …",
        "push to me/cut done",
    ]


def test_a_repository_may_be_private_and_of_an_organisation(hub, folder):
    sh.push(folder, "lab/cut", private=True)
    assert hub.private == {"lab/cut": True}


def test_a_second_push_replaces_what_was_pushed(hub, folder):
    sh.push(folder, "me/cut")
    (folder / "model.safetensors").write_bytes(b"another")
    sh.push(folder, "me/cut")
    assert hub.repos["me/cut"] == files_of(folder)


@pytest.mark.parametrize("other", ["model.safetensors.index.json", "pytorch_model.bin", "q4.gguf"])
def test_weights_that_would_stay_beside_ours_are_refused(hub, folder, other):
    hub.repos["me/cut"] = {other: b"", "README.md": b"", ".gitattributes": b""}
    with pytest.raises(sh.OutputError, match=f"it has {other}, which would stay beside what is pu"):
        sh.push(folder, "me/cut")
    assert hub.commits == []


@pytest.mark.parametrize(
    ("repository", "said"),
    [
        ("cut", "expected USER/NAME, with the user or organisation"),
        ("a/b/c", "expected USER/NAME: "),
        ("me/c..t", "expected USER/NAME: "),
        ("you/cut", "me is not you, and no member of it: expected me/NAME or lab/NAME or readers/"),
        ("readers/cut", "me may only read what readers has"),
    ],
)
def test_a_place_that_cannot_be_pushed_to_is_refused(hub, repository, said):
    with pytest.raises(sh.OutputError, match=f"^cannot push to {repository}: {said}"):
        Push(repository).check()
    assert not any(line.startswith(("POST", "PUT")) for line in hub.requests)


def test_a_token_is_needed_that_is_valid_and_writes(hub, monkeypatch):
    hub.me["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(sh.OutputError, match="the token 'mine' of me only reads: make one that"):
        Push("me/cut").check()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(sh.OutputError, match="Invalid user token"):
        Push("me/cut").check()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        sh.OutputError, match="there is no token: run 'hf auth login', or set HF_TO"
    ):
        Push("me/cut").check()


def test_a_fine_grained_token_is_left_to_the_hub(hub):
    hub.me["auth"]["accessToken"]["role"] = "fineGrained"
    Push("you/cut").check()


def test_without_a_net_nothing_is_begun(hub, monkeypatch):
    hub.failing["whoami"] = 0
    with pytest.raises(sh.OutputError, match="cannot push to me/cut: "):
        Push("me/cut").check()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(sh.OutputError, match="HF_HUB_OFFLINE is set: unset it"):
        Push("me/cut").check()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("repos/create", 403),
        ("preupload", 401),
        ("PUT /put", 0),
        ("PUT /put", 500),
        ("/commit/", 0),
    ],
)
def test_a_push_that_breaks_off_leaves_the_folder_and_says_how_to_go_on(
    hub, folder, request_line, status
):
    before = files_of(folder)
    hub.failing[request_line] = status
    with pytest.raises(sh.OutputError) as caught:
        sh.push(folder, "me/cut")
    said = str(caught.value)
    assert said.startswith("pushing to me/cut broke off: ")
    assert said.endswith(f"; {folder} is whole, and 'hf upload me/cut {folder}' goes on")
    assert TOKEN not in said
    assert files_of(folder) == before
    assert hub.commits == []
    hub.failing.clear()
    sh.push(folder, "me/cut")
    assert hub.repos["me/cut"] == before


def test_what_is_not_there_is_not_pushed(hub, tmp_path):
    with pytest.raises(sh.OutputError, match="there is no folder"):
        sh.push(tmp_path / "nowhere", "me/cut")
    assert hub.repos == {}
