from __future__ import annotations

import pytest
from conftest import draw, numbered
from huggingface_hub import errors

from lm_calib_plugin.calibration.sources import hub_access
from lm_calib_plugin.errors import CalibError, UserError

try:  # the client of the hub library; its name changed between versions
    import httpx2 as httpx
except ImportError:
    import httpx


def response(status):
    return httpx.Response(status, request=httpx.Request("GET", "https://example.org"))


def hub_error(kind, status):
    try:
        return kind("no", response=response(status))
    except Exception:  # the client library of the hub package differs between versions
        error = kind.__new__(kind)
        Exception.__init__(error, "no")
        return error


@pytest.fixture
def answers(monkeypatch):
    def set_answer(error=None):
        def ask(path, revision):
            if error is not None:
                raise error
            return hub_access.HubAnswer("a" * 40, "odc-by")

        monkeypatch.setattr(hub_access, "ask_hub", ask)

    return set_answer


@pytest.fixture
def stream(monkeypatch):
    """A streamed data set made of rows in memory."""
    import datasets

    asked = []

    def load(path, config, *, split, streaming=False, revision=None):
        asked.append((path, config, split, streaming, revision))
        made = datasets.Dataset.from_dict({"text": numbered(60, 20)})
        return made.to_iterable_dataset() if streaming else made

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_stream_is_pinned_shuffled_and_recorded(words, answers, stream):
    answers()
    drawn = draw("hf:org/data:cfg:dev?buffer=20", words)
    assert stream == [("org/data", "cfg", "dev", True, "a" * 40)]
    (record,) = drawn.sources
    assert record["fingerprint"] == "a" * 40
    assert record["licence"] == "odc-by"
    assert (record["streamed"], record["buffer"], record["pack"]) == (True, 20, "longdoc")
    assert record["documents"] == 4
    assert draw("hf:org/data:cfg:dev?buffer=20", words).calib_id == drawn.calib_id
    other = draw("hf:org/data:cfg:dev?buffer=20", words, calib_seed=1)
    assert other.calib_id != drawn.calib_id


def test_concat_reads_a_stream_in_its_own_order(words, answers, stream):
    answers()
    drawn = draw("hf:org/data", words, pack="concat", nsamples=150)
    assert sorted(drawn.sources[0]["indices"]) == list(range(0, 1200, 8))
    assert "buffer" not in drawn.sources[0]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("no route"),
            r"cannot be reached .*calibration=self.*hf download org/data",
        ),
        (httpx.ConnectError("no route"), "cannot be reached"),
        (hub_error(errors.GatedRepoError, 403), "is gated; accept its terms .*hf auth login"),
        (hub_error(errors.RepositoryNotFoundError, 404), "no data set `org/data`.*hf auth login"),
        (hub_error(errors.RevisionNotFoundError, 404), "has no revision `v9`"),
        (errors.OfflineModeIsEnabled("off"), "cannot be reached"),
    ],
)
def test_the_reason_is_told_apart(words, answers, monkeypatch, error, message):
    answers(error)
    monkeypatch.setattr(hub_access, "in_local_cache", lambda path: False)
    with pytest.raises(UserError, match=message):
        draw("hf:org/data?revision=v9", words)


def test_offline_with_an_earlier_download(words, answers, stream, monkeypatch):
    answers(ConnectionError("no route"))
    monkeypatch.setattr(hub_access, "in_local_cache", lambda path: True)
    drawn = draw("hf:org/data", words)
    assert stream[0][3] is False
    assert drawn.sources[0]["cached"] is True
    with pytest.raises(UserError, match="cannot be reached"):
        draw("hf:org/data?revision=v9", words)


def test_a_stream_that_breaks_says_where(words, answers, monkeypatch):
    import datasets

    answers()

    class Broken:
        column_names = None
        info = None

        def shuffle(self, **_):
            return self

        def __iter__(self):
            yield {"text": "w1 w2"}
            raise ConnectionError("reset")

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Broken())
    with pytest.raises(CalibError, match="broke after 1 rows"):
        draw("hf:org/data", words)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("Config name is missing.\nPick one among: a, b"), "Pick one among: a, b"),
        (FileNotFoundError("no files"), "no files"),
        (FileNotFoundError("'x' is a gated dataset"), "is gated; accept its terms"),
    ],
)
def test_what_the_library_says_is_passed_on_short(words, answers, monkeypatch, error, message):
    import datasets

    answers()

    def load(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=message) as caught:
        draw("hf:org/data", words)
    assert "gated" in message or "config `default`, split `train`" in str(caught.value)


def test_other_errors_are_not_hidden(words, answers, monkeypatch):
    import datasets

    answers()

    def load(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ZeroDivisionError):
        draw("hf:org/data", words)


def test_local_cache_is_looked_for(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert not hub_access.in_local_cache("org/data")
    (tmp_path / "org___data" / "default").mkdir(parents=True)
    assert hub_access.in_local_cache("org/data")


@pytest.mark.parametrize(
    ("card", "wanted"),
    [({"license": "mit"}, "mit"), ({"license": ["mit", "cc0-1.0"]}, "mit, cc0-1.0"), (None, None)],
)
def test_revision_and_license_come_from_one_question(monkeypatch, card, wanted):
    from types import SimpleNamespace

    import huggingface_hub

    def dataset_info(self, path, *, revision, timeout):
        return SimpleNamespace(sha="b" * 40, card_data=card and SimpleNamespace(**card))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    assert hub_access.ask_hub("org/data", None) == ("b" * 40, wanted)
