"""Wrong paths are reported without using a network."""

import pytest

from recurrent_depth.hub import check_folder_or_hub_name, in_hub_cache


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """A working directory with one run and an empty cache of the hub; access to the hub is allowed."""
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "weights.bin").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/frist", r"model: no such folder 'runs/frist'; did you mean runs/first\?"),
        ("runs/other", "no such folder 'runs/other'; correct the path"),
        ("nowhere", "no such folder 'nowhere'; a model on the Hugging Face hub is written ORG/NAME"),
        ("./tomg/huginn", r"no such folder './tomg/huginn'"),
        ("/tomg-group/huginn", "no such folder '/tomg-group/huginn'"),
        ("a/b/c", "no such folder 'a/b/c'"),
        ("org/name/", "no such folder 'org/name/'"),
        ("", "no such folder ''"),
        ("~/model", "no such folder '~/model'"),
        ("weights.bin", "a file; give the folder"),
        ("org\\name", "no such folder"),
    ],
)
def test_folder_name_that_does_not_exist_is_an_error(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        check_folder_or_hub_name(name)


@pytest.mark.parametrize("name", ["runs/first", "runs", ".", "..", "tomg-group-umd/huginn-0125", "Qwen/Qwen2.5-7B"])
def test_folder_or_possible_hub_name_passes(name):
    check_folder_or_hub_name(name)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_hub_name_is_an_error_when_the_hub_is_forbidden(variable, monkeypatch):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(FileNotFoundError, match=r"init_from: no such folder 'org/name', and HF_HUB_OFFLINE"):
        check_folder_or_hub_name("org/name", "init_from")


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "model"), ("org/name", "model"), ("org/rows", "dataset")])
def test_repository_in_the_cache_passes_offline(name, kind, empty_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError):
        check_folder_or_hub_name(name, kind=kind)
    (empty_folder / "cache" / f"{kind}s--{name.replace('/', '--')}").mkdir(parents=True)
    check_folder_or_hub_name(name, kind=kind)
    assert in_hub_cache(name, kind)


def test_cache_follows_the_variables_of_the_hub(empty_folder, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE")
    for variable, folder in (("HF_HOME", "home/hub"), ("XDG_CACHE_HOME", "xdg/huggingface/hub")):
        monkeypatch.setenv(variable, str(empty_folder / folder.split("/")[0]))
        assert not in_hub_cache("org/name")
        (empty_folder / folder / "models--org--name").mkdir(parents=True)
        assert in_hub_cache("org/name")
        monkeypatch.delenv(variable)
