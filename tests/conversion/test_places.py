"""A checkpoint is a folder or a hub id; what is neither is refused at once, and what the hub says is told in full."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from deepseek_latent.conversion import places
from deepseek_latent.conversion.places import download, folder_or_hub, local_or_hub

NO_HUB_IDS = ["absent", "absent/", "models/absent", "a/b/c", "./absent", "../absent", "/absent", "~/absent"]
NO_HUB_IDS += ["~no-such-user/x", "a/b.gguf", "a/config.json", "a b/c", "-a/b"]


@pytest.mark.parametrize("name", NO_HUB_IDS)
def test_a_name_that_no_model_on_the_hub_has_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"a hub id \(OWNER/NAME\), got .*, which does not exist.*; correct the name"):
        local_or_hub(name)


def test_a_folder_is_preferred_to_a_hub_id_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_or_hub("owner/name") == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert folder_or_hub("owner/name").resolve() == tmp_path / "owner" / "name"


def test_a_file_in_place_of_a_folder_is_refused_with_the_name_of_its_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert local_or_hub(str(tmp_path / "config.json")) == tmp_path / "config.json"
    with pytest.raises(ValueError, match=f"got the file {tmp_path}/config.json; name its folder, {tmp_path}"):
        folder_or_hub(str(tmp_path / "config.json"))


def not_reached() -> OSError:
    error = LocalEntryNotFoundError("a long text " * 40)
    error.__cause__ = ConnectionError("[Errno -2] Name or service not known")
    return error


def answered(status: int, *, while_downloading: bool = False) -> OSError:
    # a response is made by another library in each version of huggingface_hub
    answer = HfHubHTTPError.__new__(HfHubHTTPError)
    answer.response = SimpleNamespace(status_code=status)
    if while_downloading:
        answer.__cause__ = RuntimeError("of the HTTP library")
        return answer
    error = LocalEntryNotFoundError("a long text " * 40)
    error.__cause__ = answer
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (answered(429), "the hub answered with status 429; try again later"),
        (answered(503, while_downloading=True), "the hub answered with status 503; try again later"),
        (answered(403), "the hub answered with status 403; correct the name, or run hf auth login"),
        (GatedRepoError.__new__(GatedRepoError), "its owner has to give you access"),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "the hub does not have it either, or it is private"),
        (not_reached(), r"the hub was not reached \(ConnectionError\); correct the name, or try again online"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_why_nothing_was_downloaded_is_one_whole_sentence(error, words, monkeypatch):
    def fail(hub_id, allow_patterns):
        raise error

    monkeypatch.setattr(places, "snapshot_download", fail)
    with pytest.raises(ValueError, match=f"^expected a folder or a hub id, got owner/name: .*{words}.*\\.$") as refused:
        download("owner/name", ["config.json"])
    assert "Errno" not in str(refused.value)


def test_an_error_of_the_system_is_not_taken_for_one_of_the_hub(monkeypatch):
    def fail(hub_id, allow_patterns):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(places, "snapshot_download", fail)
    with pytest.raises(OSError, match="No space left on device"):
        download("owner/name", ["config.json"])
