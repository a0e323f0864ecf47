"""The example of learning from feedback: rewards, sources, the form, and one round of the loop."""

import importlib
import io
import json
import math
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs import texts
from envs.errors import BadInput, UnknownName

FOLDER = Path(__file__).parent.parent / "examples" / "feedback"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def part(name):
    return importlib.import_module(name)


@pytest.fixture
def rewards():
    return part("rewards")


@pytest.fixture
def sources():
    return part("sources")


@pytest.fixture
def items():
    item = part("candidates").Item
    return [
        item("r1-0", "how are you?", ("fine", "bad", "i am"), ("greedy", "beam", "sampling")),
        item("r1-1", "<b>who?</b>", ("me & you", "nobody"), ("greedy", "nucleus")),
    ]


# Rewards.


def test_scores_are_places_on_the_scale(rewards):
    assert rewards.by_score([-4, 0, 4.0], 3) == [0, 0.5, 1]


def test_ranks_are_shares_beaten_and_ties_share(rewards):
    assert rewards.by_rank([2, 1, 3], 3) == [0.5, 1, 0]
    assert rewards.by_rank([1, 1, 3], 3) == [0.75, 0.75, 0]
    assert rewards.by_rank([1], 1) == [0]


def test_comparisons_are_the_strengths_of_bradley_and_terry(rewards):
    """Of two texts, one win: the likelihood's maximum is where 1/(1+s²) = (s-1)/(s+1)."""
    weak, strong, unseen = rewards.by_comparison([[2, 1]], 3)
    s = strong / (1 - strong)
    assert 1 / (1 + s * s) == pytest.approx((s - 1) / (s + 1))
    assert weak == pytest.approx(1 - strong)
    assert unseen is None
    first, second, third = rewards.by_comparison([[1, 2], [2, 3]], 3)
    assert second == pytest.approx(0.5)
    assert first == pytest.approx(1 - third)
    assert first > 0.6
    assert rewards.by_comparison([[1, 2], [2, 1]], 2) == pytest.approx([0.5, 0.5])


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6))
def test_pairs_follow_the_scores_whatever_they_are(scores):
    texts = [f"text {n}" for n in range(len(scores))]
    score = dict(zip(texts, scores, strict=True))
    found = part("rewards").pairs("scores", "?", texts, scores)
    assert all(0 < pair.margin <= 1 and score[pair.chosen] > score[pair.rejected] for pair in found)
    clear = sum(abs(a - b) >= 0.17 for i, a in enumerate(scores) for b in scores[:i])
    assert len(found) >= clear


def test_ties_unjudged_and_equal_texts_make_no_pairs(rewards):
    texts = ["a", "b", "c"]
    assert rewards.pairs("scores", "?", texts, [1, 1, 1]) == []
    assert rewards.pairs("scores", "?", ["a", "a"], [1, 3]) == []
    found = rewards.pairs("rankings", "?", texts, [1, 1, 3])
    assert [(p.chosen, p.rejected) for p in found] == [("a", "c"), ("b", "c")]
    found = rewards.pairs("comparisons", "?", texts, [[3, 1]])
    assert [(p.chosen, p.rejected) for p in found] == [("c", "a")]


def test_what_people_write_beats_what_it_replaces(rewards):
    texts = ["a", "b"]
    assert rewards.pairs("edits", "?", texts, {"2": "  good\n day ", "1": "a"}) == [
        ("?", "good day", "b", 1.0)
    ]
    assert rewards.pairs("demonstrations", "?", texts, ["b"]) == [("?", "b", "a", 1.0)]


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("scores", None, "no list"),
        ("scores", "123", "no list"),
        ("scores", [1, 2], "length 2"),
        ("scores", [1, None, 2], "no finite number"),
        ("scores", [1, True, 2], "no finite number"),
        ("scores", [1, math.nan, 2], "no finite number"),
        ("scores", [1, math.inf, 2], "no finite number"),
        ("scores", [1, 4.1, 2], "off the scale"),
        ("scores", [1, 10**400, 2], "off the scale"),
        ("rankings", [1, 2, 4], "no rank"),
        ("rankings", [1, 2, 1.5], "no rank"),
        ("rankings", [1, 2, 10**400], "no rank"),
        ("comparisons", [[1, 1]], "no pair"),
        ("comparisons", [[1, 4]], "no pair"),
        ("comparisons", [[0, 1]], "no pair"),
        ("comparisons", [[1, 2, 3]], "no pair"),
        ("comparisons", [None], "no pair"),
        ("comparisons", 3, "no list"),
        ("edits", ["a"], "no object"),
        ("edits", {"4": "a"}, "no text's number"),
        ("edits", {"x": "a"}, "no text's number"),
        ("edits", {"1" * 5000: "a"}, "no text's number"),
        ("edits", {"1": " "}, "no text of"),
        ("edits", {"1": None}, "no text of"),
        ("demonstrations", "a", "no list"),
        ("demonstrations", ["a" * 401], "no text of"),
    ],
)
def test_feedback_that_cannot_be_used_is_one_sentence(rewards, kind, value, said):
    with pytest.raises(BadInput, match=said) as error:
        rewards.pairs(kind, "?", ["a", "b", "c"], value)
    assert str(error.value).startswith(f"feedback: {kind}: ")
    assert len(str(error.value)) < 200
    assert "; " in str(error.value)


def test_an_unknown_kind_is_refused(rewards):
    with pytest.raises(UnknownName, match="scores"):
        rewards.pairs("score", "?", ["a"], [1])


# What people type, and files.


@pytest.mark.parametrize(
    ("kind", "line", "wanted"),
    [
        ("scores", "3, -1 0.5", [3.0, -1.0, 0.5]),
        ("rankings", "2 1=3", [2, 1, 2]),
        ("rankings", "1 = 2 3", [1, 1, 3]),
        ("comparisons", "1>2 3>2", [[1, 2], [3, 2]]),
        ("edits", "2 good day to you", {"2": "good day to you"}),
        ("demonstrations", "good day", ["good day"]),
    ],
)
def test_typed_feedback(sources, kind, line, wanted):
    assert sources.parse(kind, line, 3) == wanted


@pytest.mark.parametrize(
    ("kind", "line"),
    [("scores", "good"), ("rankings", "1 2"), ("rankings", "1 1 2"), ("comparisons", "1<2")],
)
def test_typed_nonsense_is_refused_with_the_form_it_should_have(sources, kind, line):
    with pytest.raises(BadInput, match="such as"):
        sources.parse(kind, line, 3)


def test_the_terminal_asks_again_leaves_out_and_ends(sources, items):
    out = io.StringIO()
    lines = "1 2\n1 9 2\n3 -1 0\n\n"
    terminal = sources.Terminal(io.StringIO(lines), out)
    assert list(terminal.ask(items, "scores")) == [{"id": "r1-0", "scores": [3.0, -1.0, 0.0]}]
    said = out.getvalue()
    assert "of length 2" in said
    assert "off the scale" in said
    assert "[2/2] <b>who?</b>" in said
    assert list(sources.Terminal(io.StringIO("q\n"), out).ask(items, "scores")) == []
    assert list(sources.Terminal(io.StringIO(""), out).ask(items, "scores")) == []


def test_the_terminal_shows_no_control_characters(sources):
    item = part("candidates").Item("a", "\x1b[2Jhi", ("\x07x", "y"), ("greedy", "beam"))
    out = io.StringIO()
    list(sources.Terminal(io.StringIO("q\n"), out).ask([item], "scores"))
    assert "\x1b" not in out.getvalue()
    assert "?[2Jhi" in out.getvalue()


def test_a_file_gives_the_rows_of_the_items_it_knows(sources, items, tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"id": "r1-1", "scores": [1, 2]}, {"id": "r2-0", "said": "a\u2028b\x85c"}]
    lines = [json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows]
    path.write_bytes("".join(lines).encode())
    assert list(sources.File(path).ask(items, "scores")) == rows[:1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no line is about r1-0 … r1-1"),
        ("{", "line 1"),
        ("[1]", 'line 1: no object with an "id"'),
        ('{"id": "r1-0"}', "line 1: feedback: scores: missing"),
        ('{"id": "r1-0", "scores": [1, NaN, 2]}', "line 1: feedback: scores: 'nan'"),
        ('\n{"id": "r1-0", "scores": [1, 2, 3]}', "line 1"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(sources, items, tmp_path, content, said):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(BadInput, match=re.escape(said)):
        list(sources.File(path).ask(items, "scores"))


def test_a_file_that_is_not_there_yet_says_what_is_wanted(sources, items, tmp_path):
    with pytest.raises(BadInput, match="repeat the command"):
        list(sources.File(tmp_path / "none").ask(items, "scores"))


def count_good(texts):
    """A rater that likes one word and dislikes another."""
    return [float(text.split().count("good") - text.split().count("bad")) for text in texts]


def test_the_model_says_in_every_kind_what_its_ratings_say(sources):
    item = part("candidates").Item("a", "?", ("good bad", "good", "bad"), ("greedy",) * 3)
    model = sources.Model(count_good, ["bad", "good good"], seed=0)
    said = {kind: next(model.ask([item], kind))[kind] for kind in sources.HINTS}
    assert said["scores"] == [0, 1, -1]
    assert said["rankings"] == [2, 1, 3]
    assert said["edits"] == {"1": "good"}
    assert said["demonstrations"] == ["good good"]
    worth = [0, 1, -1]
    assert said["comparisons"]
    assert all(worth[a - 1] > worth[b - 1] for a, b in said["comparisons"])
    for kind, value in said.items():
        assert part("rewards").pairs(kind, "?", item.texts, value)


# The web form.


@pytest.fixture
def opened(items):
    """A form that is asked in a thread, its address, and the rows that it gives."""
    addresses, rows = [], []
    ready = threading.Event()

    def say(line):
        addresses.append(re.search(r"http\S+", line)[0])
        ready.set()

    def ask():
        rows.extend(part("form").Form(say=say).ask(items, "scores"))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert ready.wait(10)
    return addresses[0], rows, thread


def send(address, **fields):
    body = urllib.parse.urlencode(fields).encode() if fields else None
    try:
        with urllib.request.urlopen(address, body, timeout=10) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


def test_the_form_collects_over_http(opened):
    address, rows, thread = opened
    status, page, headers = send(address)
    assert (status, "0 of 2 done" in page, "how are you?" in page) == (200, True, True)
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    status, page, _ = send(address, id="r1-0", answer='1 2 "><script>')
    assert (status, "0 of 2 done" in page, "<script>" in page) == (422, True, False)
    status, page, _ = send(address, id="r1-0", answer="3 -1 0")
    assert (status, "1 of 2 done" in page) == (200, True)
    assert "&lt;b&gt;who?&lt;/b&gt;" in page
    assert "me &amp; you" in page
    send(address, id="r1-0", answer="1 1 1")  # sent twice: passed over
    status, page, _ = send(address, id="r1-1", answer="", skip="1")
    assert (status, "Thank you" in page) == (200, True)
    thread.join(10)
    assert not thread.is_alive()
    assert rows == [{"id": "r1-0", "scores": [3.0, -1.0, 0.0]}]


def test_the_form_tells_strangers_nothing(opened):
    address, rows, thread = opened
    root = address.rsplit("/", 1)[0]
    for path in ("/", "/index.html", "/" + "a" * 22):
        assert send(root + path)[0] == 404
        assert send(root + path, id="r1-0", answer="1 1 1")[0] == 404
    assert send(address, id="r1-0", answer="1" * 200_000)[0] == 413
    assert rows == []
    for name in ("r1-0", "r1-1"):
        send(address, id=name, skip="1")
    thread.join(10)
    assert not thread.is_alive()


def test_a_port_in_use_is_one_sentence(opened, items):
    address, _, thread = opened
    port = int(re.search(r":(\d+)/", address)[1])
    with pytest.raises(BadInput, match=f"web: port: {port} cannot be used"):
        next(part("form").Form(port).ask(items, "scores"))
    for name in ("r1-0", "r1-1"):
        send(address, id=name, skip="1")
    thread.join(10)


# The loop.


def test_settings_that_cannot_be_used_are_refused():
    settings = part("loop").Settings
    with pytest.raises(BadInput, match="loop: source: 'people'; give one of model, file"):
        settings(source="people")
    with pytest.raises(BadInput, match="loop: kind: 'likes'"):
        settings(kind="likes")
    with pytest.raises(BadInput, match="loop: rounds: 0 is too small"):
        settings(rounds=0)


def test_prompts_that_run_out_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    loop = part("loop")
    turns = [texts.Turn(f"so {number}?", "yes") for number in range(2 * loop.ROWS + 100)]
    monkeypatch.setattr(texts, "dialogue", lambda: {"train": turns, "test": turns[:9]})
    with pytest.raises(BadInput, match="prompts: 34 in each of 3 rounds are more than the 100"):
        loop.run(loop.Settings(rounds=3, prompts=34), tmp_path / "new")
    assert not (tmp_path / "new").exists()

    def begin(settings, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_begin", begin)
    with pytest.raises(KeyboardInterrupt):
        loop.run(loop.Settings(rounds=4, prompts=25), tmp_path / "new")


def test_a_folder_holds_one_run(tmp_path):
    loop = part("loop")
    loop._begin(loop.Settings(), tmp_path / "run")
    loop._begin(loop.Settings(), tmp_path / "run")
    with pytest.raises(BadInput, match="holds a run with seed 0; give another"):
        loop._begin(loop.Settings(seed=1), tmp_path / "run")
    with pytest.raises(BadInput, match="tiny-32: tokenizer: no end token"):
        loop._begin(loop.Settings(model="tiny-32"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(BadInput, match="is not empty"):
        loop._begin(loop.Settings(), tmp_path / "other")


def test_feedback_is_kept_row_by_row(tmp_path, sources, items):
    """A session that breaks off asks, when it goes on, only for what is missing."""
    loop, asked = part("loop"), []

    class Breaks:
        def ask(self, items, kind):
            asked.append([item.id for item in items])
            yield {"id": items[0].id, "scores": list(range(len(items[0].texts)))}
            if len(asked) == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop._feedback(tmp_path, items, "scores", Breaks())
    with open(tmp_path / "feedback.jsonl", "a") as file:
        file.write('{"id": "r1-1", "sco')  # cut off
    pairs = loop._feedback(tmp_path, items, "scores", Breaks())
    assert asked == [["r1-0", "r1-1"], ["r1-1"]]
    assert len(pairs) == 3 + 1
    assert loop._feedback(tmp_path, items, "scores", None) == pairs


@pytest.mark.parametrize("session", ["q\n", "", "\n\n", "1 1 1\n2 2\n", "3 -1 0\nq\n"])
def test_a_session_that_tells_nothing_is_no_feedback(tmp_path, sources, items, session):
    """What does tell texts apart is kept; the rest is asked again."""
    loop = part("loop")

    def say(lines, before=()):
        terminal = sources.Terminal(io.StringIO(lines), out := io.StringIO())
        try:
            return loop._feedback(tmp_path, items, "scores", terminal, before)
        finally:
            said.append(out.getvalue())

    said = []
    with pytest.raises(BadInput, match="and repeat the command") as error:
        say(session)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "feedback.done").exists()
    kept = session.startswith("3")
    assert ("r1-0" in (tmp_path / "feedback.jsonl").read_text()) == kept
    pairs = say("1 2\n" if kept else "3 -1 0\n1 2\n")
    assert len(pairs) == 3 + 1
    assert ("how are you?" in said[1]) != kept
    assert loop._feedback(tmp_path, items, "scores", None) == pairs


def test_a_later_round_may_be_all_ties_but_not_empty(tmp_path, sources, items):
    loop, pair = part("loop"), part("rewards").Pair
    before = [pair("a", "x", "y", 1.0), pair("b", "x", "y", 1.0)]
    empty, ties = (sources.Terminal(io.StringIO(s), io.StringIO()) for s in ("q", "1 1 1\n2 2\n"))
    with pytest.raises(BadInput, match="feedback: there is none; give scores"):
        loop._feedback(tmp_path, items, "scores", empty, before)
    assert loop._feedback(tmp_path, items, "scores", ties, before) == []
    assert (tmp_path / "feedback.done").exists()


def test_a_file_that_is_mended_is_read_anew(tmp_path, sources, items):
    loop, path = part("loop"), tmp_path / "mine.jsonl"

    def give(first, second):
        rows = [{"id": "r1-0", "scores": first}, {"id": "r1-1", "scores": second}]
        path.write_text("\n".join(map(json.dumps, rows)))
        return loop._feedback(tmp_path, items, "scores", sources.File(path))

    with pytest.raises(BadInput, match="line 2: feedback: scores"):
        give([1, 2, 3], [1, 9])
    assert (tmp_path / "feedback.jsonl").read_text() == ""
    for wrong in ([1, 1], [2, 2]):
        with pytest.raises(BadInput, match="1 prompts have a better and a worse text, and 2 must"):
            give([1, 2, 3], wrong)
    pairs = give([3, 2, 1], [1, 2])
    assert [pair.chosen for pair in pairs] == ["fine", "fine", "bad", "nobody"]
    path.unlink()  # a round that is done needs it no more
    assert loop._feedback(tmp_path, items, "scores", sources.File(path)) == pairs


def test_a_stage_that_broke_off_is_done_anew_and_a_finished_one_is_not(tmp_path):
    loop, calls = part("loop"), []

    def work(folder):
        calls.append(sorted(path.name for path in folder.iterdir()))
        (folder / "half").write_text("")
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"x": 1}

    with pytest.raises(KeyboardInterrupt):
        loop._stage("a stage", tmp_path / "stage", work)
    assert loop._stage("a stage", tmp_path / "stage", work) == {"x": 1}
    assert loop._stage("a stage", tmp_path / "stage", work) == {"x": 1}
    assert calls == [[], []]


def test_intervals_hold_the_mean():
    evaluation = part("evaluation")
    assert evaluation.interval([2.0] * 9) == (2, 2, 2)
    mean, low, high = evaluation.interval([0.0, 1.0] * 200)
    assert (mean, low < 0.5 < high) == (0.5, True)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    assert evaluation.gain([0, 1, 2], [1, 2, 3]) == (1, 1, 1)


def test_repeats_are_the_words_said_before():
    repeats = part("evaluation").repeats
    assert repeats(["yes, you! You, you.", "no"]) == pytest.approx(2 / 5)
    assert repeats(["one two", "one two"]) == 0
    assert repeats(["", "..."]) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of TRL's own
def test_one_round_end_to_end(tmp_path, monkeypatch):
    loop, show = part("loop"), part("show")
    few = {split: rows[:1500] for split, rows in texts.ratings().items()}
    monkeypatch.setattr(texts, "ratings", lambda: few)
    settings = loop.Settings(
        rounds=1, prompts=30, held_out=24, rater_epochs=1, imitation_steps=20,
        reward_steps=20, policy_steps=4,
    )  # fmt: skip
    found = loop.run(settings, tmp_path)
    assert len(found) == 2
    assert found[0]["scores"]["rater"] != found[1]["scores"]["rater"]
    judged = json.loads((tmp_path / "judges" / "rater" / "done.json").read_text())
    assert judged["correlation"] > 0.3
    for stage in ("start/policy", "round-1/reward", "round-1/policy"):
        turns = (tmp_path / stage / "tuner.jsonl").read_text().splitlines()
        assert len(turns) >= 3, stage
        assert all(math.isfinite(json.loads(turn)["applied"]["rate"]) for turn in turns)
    assert (tmp_path / "reward.svg").stat().st_size > 1000
    assert "round 1" in show.table(found)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}
    assert loop.run(settings, tmp_path) == found
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}
