"""The listening test: blind page, webMUSHRA export, and intervals that cover what they claim."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import needs_chromium, told_by
from made_run import TEXTS, made_run

from mamtra_ray.errors import InputError
from mamtra_ray.listening_test.__main__ import main
from mamtra_ray.listening_test.opinion_scores import Rating, half_width, opinion_scores, read_key, read_scores
from mamtra_ray.listening_test.page import choose_stimuli, make_test, score_test
from mamtra_ray.run.folder import read_run
from mamtra_ray.run.names import AUDIO


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    base = tmp_path_factory.mktemp("runs")
    return [made_run(base / "first"), made_run(base / "second", penalty=0.1, seed=5)]


@pytest.fixture
def made(runs, tmp_path) -> Path:
    make_test(choose_stimuli([read_run(path) for path in runs], None, None, seed=3), tmp_path / "test")
    return tmp_path / "test"


def responses(key: dict, listener: str, scores: dict[str, int]) -> dict:
    """What the page saves when every clip of a system gets that system's score."""
    ratings = [{"clip": clip, "score": scores[found["system"]]} for clip, found in key["clips"].items()]
    content = {"kind": "listening_test_responses", "schema_version": 1, "test_id": key["test_id"]}
    return content | {"listener": listener, "ratings": ratings}


def test_the_page_hides_the_systems(made, runs):
    page = (made / "test.html").read_text()
    key = read_key(made)
    assert len(key["systems"]) == 3 and key["systems"][0] == "teacher"
    assert {system.split("/")[0] for system in key["systems"][1:]} == {"first", "second"}
    for name in (*key["systems"], "AMAM", "teacher", *(system.split("/")[-1] for system in key["systems"])):
        assert name not in page
    assert not re.search(r"https?://", page)
    # Every clip is in the page under its meaningless name, byte for byte the run's file.
    teacher = {found["utterance_id"]: clip for clip, found in key["clips"].items() if found["system"] == "teacher"}
    assert set(teacher) == set(TEXTS)
    for utterance_id, clip in teacher.items():
        sound = re.search(rf'"{clip}": "([^"]+)"', page)[1]
        assert base64.b64decode(sound) == (runs[0] / AUDIO / "teacher" / f"{utterance_id}.wav").read_bytes()


def test_the_webmushra_export(made):
    key = read_key(made)
    [config] = (made / "webmushra" / "configs").glob("*.yaml")
    content = yaml.safe_load(config.read_text())
    page = next(page for page in content["pages"] if page["type"] == "likert_single_stimulus")
    assert set(page["stimuli"]) == set(key["clips"]) and page["mustPlayback"] == "ended"
    assert sorted(response["value"] for response in page["response"]) == [1, 2, 3, 4, 5]
    for file in page["stimuli"].values():
        assert (made / "webmushra" / file).exists()
    assert "teacher" not in config.read_text()

    # Its results as service/write.php writes them: the questionnaire's answer after the test's id.
    rows = ["session_test_id,listener,trial_id,stimuli_rating,stimuli,rating_time"]
    for listener in ("ann", "bob"):
        for clip, found in key["clips"].items():
            score = {"teacher": 4}.get(found["system"], 3)
            rows.append(f"{key['test_id']},{listener},naturalness,{score},{clip},5210")
    (made / "responses" / "lss.csv").write_text("\n".join(rows) + "\n")
    scores = {score.system: score for score in score_test(made)}
    assert scores["teacher"].mean == 4 and scores["teacher"].listeners == 2
    assert all(score.difference == -1 for name, score in scores.items() if name != "teacher")


def test_scores_from_the_page(made, capsys):
    key = read_key(made)
    student, other = key["systems"][1:]
    for listener, level in (("a", 5), ("b", 3)):
        content = responses(key, listener, {"teacher": level, student: level - 1, other: level - 2})
        (made / "responses" / f"{listener}.json").write_text(json.dumps(content))
    assert main(["score", str(made), "--json"]) == 0
    scores = {score["system"]: score for score in json.loads(capsys.readouterr().out)}
    assert scores["teacher"]["mean"] == 4 and scores[student]["mean"] == 3
    # The listeners disagree about the level but not about the difference.
    assert scores["teacher"]["half_width"] > 1
    assert scores[student]["difference"] == -1 and scores[student]["difference_half_width"] == 0
    assert "CrowdMOS" in (made / "mean_opinion_scores.json").read_text()
    assert [score.mean for score in read_scores(made)] == [4, 3, 2]
    assert main(["score", str(made)]) == 0
    assert "+-" in capsys.readouterr().out


def test_wrong_responses_get_one_sentence(made, capsys):
    key = read_key(made)

    def refused(**changes) -> str:
        content = responses(key, "a", dict.fromkeys(key["systems"], 3)) | changes
        path = made / "wrong.json"
        path.write_text(json.dumps(content))
        assert main(["score", str(made), str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    clip = next(iter(key["clips"]))
    assert "another test" in refused(test_id="0" * 16)
    assert "no responses" in refused(kind="something")
    assert "from 1 to 5" in refused(ratings=[{"clip": clip, "score": 6}])
    assert "no clip" in refused(ratings=[{"clip": "c00", "score": 3}])
    assert "twice" in refused(ratings=[{"clip": clip, "score": 3}] * 2)
    assert "damaged" in refused(ratings=[{"clip": clip}])
    assert main(["score", str(made)]) == 2
    assert "put the listeners' JSON files" in capsys.readouterr().err
    both = [made / "one.json", made / "two.json"]
    for path in both:
        path.write_text(json.dumps(responses(key, "a", dict.fromkeys(key["systems"], 3))))
    assert main(["score", str(made), *map(str, both)]) == 2
    assert "already in" in capsys.readouterr().err


def test_what_can_be_compared(runs, tmp_path, capsys):
    read = [read_run(path) for path in runs]
    only = choose_stimuli(read, ["codec", "teacher"], 1, seed=0)
    assert {stimulus.system for stimulus in only} == {"codec", "teacher"}
    assert len({stimulus.utterance_id for stimulus in only}) == 1
    with pytest.raises(InputError, match="did you mean 'teacher'"):
        choose_stimuli(read, ["techer", "codec"], None, 0)
    with pytest.raises(InputError, match="at least two"):
        choose_stimuli(read, ["codec"], None, 0)
    assert main(["make", "--run", str(runs[0]), "--output", str(tmp_path / "t"), "--dry-run"]) == 0
    assert "4 clips: 2 utterances" in capsys.readouterr().out and not (tmp_path / "t").exists()
    assert main(["make", "--run", str(runs[0]), "--output", str(tmp_path / "t")]) == 0
    # The same command again keeps the test; another test may not replace it.
    before = (tmp_path / "t" / "test.html").read_text()
    assert main(["make", "--run", str(runs[0]), "--output", str(tmp_path / "t")]) == 0
    assert (tmp_path / "t" / "test.html").read_text() == before
    assert main(["make", "--run", str(runs[0]), "--output", str(tmp_path / "t"), "--seed", "1"]) == 2


def test_two_runs_of_one_name_stay_apart(tmp_path, capsys):
    folders = [made_run(tmp_path / "a" / "demo"), made_run(tmp_path / "b" / "demo", seed=5)]
    command = ["make", "--output", str(tmp_path / "t"), "--run"]
    assert main([*command, str(folders[0]), "--run", str(folders[1])]) == 0
    key = read_key(tmp_path / "t")
    assert [system.rsplit("/", 1)[0] for system in key["systems"][1:]] == ["a/demo", "b/demo"]
    assert len(key["clips"]) == 6
    assert main([*command, str(folders[0]), "--run", str(folders[0])]) == 2
    assert "given twice" in capsys.readouterr().err


def simulated(randomness, listeners, utterances, spread, missing=0.0):
    """Ratings around 3.6 with independent effects of listener and utterance."""
    v_w, v_s, v_u = spread
    ratings = 3.6 + randomness.normal(0, v_w, (listeners, 1)) + randomness.normal(0, v_s, (1, utterances))
    ratings = ratings + randomness.normal(0, v_u, (listeners, utterances))
    ratings[randomness.random(ratings.shape) < missing] = np.nan
    return ratings


@pytest.mark.parametrize(
    ("listeners", "utterances", "missing", "naive_at_most"), [(15, 50, 0.0, 0.5), (6, 10, 0.0, 0.8), (15, 50, 0.5, 0.7)]
)
def test_the_interval_covers(listeners, utterances, missing, naive_at_most):
    """95 % of the intervals hold the true mean; of the naive ones far fewer."""
    randomness = np.random.default_rng(1)
    covered = naive = 0
    for _ in range(500):
        ratings = simulated(randomness, listeners, utterances, (0.35, 0.2, 0.7), missing)
        error = abs(np.nanmean(ratings) - 3.6)
        covered += error <= half_width(ratings)
        naive += error <= 1.96 * np.nanstd(ratings) / np.sqrt((~np.isnan(ratings)).sum())
    assert 0.92 <= covered / 500 <= 0.985
    assert naive / 500 < naive_at_most


@pytest.mark.parametrize(("listeners", "utterances", "missing"), [(15, 50, 0.0), (4, 30, 0.3), (12, 3, 0.4)])
def test_the_interval_is_that_of_crowdmos_but_for_the_divisor(listeners, utterances, missing, monkeypatch):
    """With variances divided by n, which ours are not, it is what the mean-opinion-score package computes."""
    published = pytest.importorskip("mean_opinion_score", reason="mean-opinion-score needs Python 3.11")
    ratings = simulated(np.random.default_rng(2), listeners, utterances, (0.35, 0.2, 0.7), missing)
    nanvar, var = np.nanvar, np.var
    monkeypatch.setattr(np, "nanvar", lambda *a, ddof=0, **k: nanvar(*a, **k))
    monkeypatch.setattr(np, "var", lambda *a, ddof=0, **k: var(*a, **k))
    assert half_width(ratings) == pytest.approx(published.get_ci95(ratings), rel=1e-5)
    monkeypatch.undo()
    assert half_width(ratings) < published.get_ci95(ratings)


def test_few_ratings_have_no_interval():
    assert half_width(np.array([[3.0, 4.0]])) is None
    assert half_width(np.array([[3.0, np.nan], [np.nan, np.nan]])) is None
    [score] = opinion_scores([Rating("a", "x", "u", 4.0)], ["x", "y"])
    assert (score.mean, score.half_width, score.ratings) == (4.0, None, 1)


LISTEN = """
  const problems = [], durations = [];
  id("begin").click();
  for (let n = 0; !id("rating").hidden && n < 50; n++) {
    if (!id("scale").disabled || !id("next").disabled) problems.push("could rate before listening");
    const ended = new Promise(done => id("player").addEventListener("ended", done, {once: true}));
    await id("player").play();
    await ended;
    if (!id("next").disabled) problems.push("could go on without a score");
    durations.push(id("player").duration);
    document.querySelector(`input[value="${1 + n % 5}"]`).click();
    id("next").click();
  }
  const saved = new Promise(done => { URL.createObjectURL = blob => { blob.text().then(done); return "#"; }; });
  id("save").click();
  tell(JSON.stringify({problems, durations, saved: await saved, shown: id("responses").value,
    stored: localStorage.getItem(storageName) !== null,
    orders: new Set(Array.from({length: 20}, () => newState().order.join())).size}));
"""


@needs_chromium
def test_a_listener_in_a_browser(made, tmp_path):
    """A listener plays and rates every clip; what the page saves can be scored, and every order is its own."""
    told = json.loads(told_by(made / "test.html", LISTEN, tmp_path))
    assert told["problems"] == [] and told["stored"] and told["saved"] == told["shown"]
    assert told["durations"] == pytest.approx([0.1] * 6)
    # 720 orders of six clips: 20 draws repeat a few at most.
    assert told["orders"] > 15
    (made / "responses" / "listener.json").write_text(told["saved"])
    ratings = json.loads(told["saved"])["ratings"]
    assert [rating["score"] for rating in ratings] == [1, 2, 3, 4, 5, 1]
    assert all(rating["plays"] == 1 for rating in ratings)
    assert sorted(rating["clip"] for rating in ratings) == sorted(read_key(made)["clips"])
    assert [score.ratings for score in score_test(made)] == [2, 2, 2]


@needs_chromium
def test_the_next_listener_on_the_same_machine(made, tmp_path):
    """Whoever comes back goes on where they stopped; after the end, somebody else begins as a new listener."""
    rate = """
      id("begin").click();
      id("player").dispatchEvent(new Event("ended"));
      document.querySelector("input[value='3']").click();
      id("next").click();
    """
    first = json.loads(told_by(made / "test.html", rate + "tell(responses());", tmp_path))
    again = json.loads(told_by(made / "test.html", "tell(responses());", tmp_path))
    assert again == first and len(first["ratings"]) == 1
    finish = """
      const before = state.listener;
      window.confirm = () => true;
      while (state.ratings.length < state.order.length) state.ratings.push({clip: "c"});
      id("begin").click();
      const offered = !id("end").hidden;
      id("anew").click();
      tell([offered, before !== state.listener, state.ratings.length, !id("start").hidden].join());
    """
    assert told_by(made / "test.html", finish, tmp_path) == "true,true,0,true"
