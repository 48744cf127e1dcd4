"""``lm-calib preflight``: what a table of R and T says, on small models and texts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, cli
from lm_calib_plugin.bank import build as bank_build
from lm_calib_plugin.calibration.folds import fold_of
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.loading import Loading
from lm_calib_plugin.preflight import Preflight, Question, preflight
from tests.bank.corpora import documents, write
from tests.tiny import make_tokenizer, saved_model

WANDA = "method=wanda,sparsity=0.5,nsamples=6,seqlen=12"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture
def text(tmp_path: Path) -> dict[str, str]:
    return {name: write(tmp_path, name) for name in ("prose", "digits", "letters")}


def ask(
    model: str,
    sets: dict[str, str],
    domains: dict[str, str],
    judged: int | None = None,
    bank: Path | None = None,
    out: Path | None = None,
    **fields: Any,
) -> Preflight:
    given = {"method": "wanda", "sparsity": 0.5, "nsamples": 6, "seqlen": 12, **fields}
    return preflight(
        Question(Recipe(**given), sets, domains, judged),
        Loading(model, device="cpu"),
        bank=bank,
        out=out,
        runtime=Runtime(progress=False),
    )


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--device", "cpu", "--quiet"])
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"method": "sparsegpt"},
        {"method": "gptq", "sparsity": None, "bits": 3, "group_size": 16},
    ],
    ids=["wanda", "sparsegpt", "gptq"],
)
def test_the_domains_own_text_is_the_measure(
    fields: dict[str, Any], model: str, text: dict[str, str]
) -> None:
    sets = {"own": text["prose"], "dots": "null:ellipsis", "both": "{prose}+{digits}"}
    sets["both"] = sets["both"].format(**text)
    found = ask(model, sets, {"p": text["prose"], "d": text["digits"]}, judged=9, **fields)
    table = found.transfer
    assert (table.sets, table.domains) == (list(sets), ["p", "d"])
    assert table.at("own", "p").regret == 1.0
    assert table.at("dots", "p").regret > 1.05
    assert table.at("dots", "d").regret > 1.05
    assert table.at("own", "d").regret > 1
    assert table.baseline == ("rtn" if "bits" in fields else "magnitude")
    kinds = {(p.source, p.fold): p for p in found.bank.header.parts}
    assert kinds["p", "judge"].second_order
    assert len(found.bank.rows("p", "judge")) == 9
    assert len(found.bank.rows("p", "choose")) == 6
    assert found.overlap == {name: {"p": 0.0, "d": 0.0} for name in sets}
    assert "overlap" not in found.table()
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(plain) == {"transfer", "calib_ids", "overlap", "seconds"}
    assert set(plain["seconds"]) == {"calibration", "bank", "transfer"}


def test_judged_documents_are_in_no_set(model: str, text: dict[str, str]) -> None:
    sets = {
        "plain": text["prose"],
        "mix": f"minimax({text['prose']}+{text['digits']})",
        "cross": f"cross({text['prose']}+{text['digits']})",
        "tasa": f"tasa({text['letters']}+{text['prose']}+{text['digits']})",
    }
    found = ask(model, sets, {"p": text["prose"]}, pack="longdoc")
    texts = {text["prose"]: documents("prose"), text["digits"]: documents("digits")}
    for number, part in enumerate(found.bank.header.parts):
        drawn = CalibrationSet.load(found.bank.folder / "sets" / f"{number:03d}")
        wanted = "judge" if part.fold == "judge" else "choose"
        for source in drawn.sources:
            for document, _ in source["indices"]:
                assert fold_of(texts[source["source"]][document]) == wanted
    assert found.overlap == {name: {"p": 0.0} for name in sets}


@pytest.mark.parametrize("seqlen", [12, 8])
def test_a_set_folder_gives_the_row_of_its_expression(
    seqlen: int, model: str, text: dict[str, str], tmp_path: Path
) -> None:
    out = str(tmp_path / "set")
    shape = ["--nsamples", "6", "--seqlen", str(seqlen), "--fold", "choose"]
    assert command("calibrate", text["prose"], "--pretrained", model, "--out", out, *shape) == 0
    domains = {"p": text["prose"], "d": text["digits"]}
    found = ask(model, {"inline": text["prose"], "folder": f"set:{out}"}, domains)
    same = found.calib_ids["inline"] == found.calib_ids["folder"]
    assert same == (seqlen == 12)
    for domain in domains:
        rows = [found.transfer.at(name, domain) for name in ("inline", "folder")]
        assert (rows[0].error == rows[1].error) == same


def test_a_set_of_judged_documents_is_told(
    model: str, text: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "set")
    shape = ["--nsamples", "12", "--seqlen", "16", "--pack", "longdoc"]
    command(
        "calibrate", text["prose"], "--pretrained", model, "--out", out, *shape, "--fold", "judge"
    )
    capsys.readouterr()
    options = ["--set", f"seen=set:{out}", "--set", f"new={text['prose']}"]
    recipe = WANDA.replace("nsamples=6", "nsamples=12").replace("seqlen=12", "seqlen=16")
    shown = command(
        "preflight", f"{recipe},pack=longdoc", "--pretrained", model, *options,
        "--domain", f"p={text['prose']}", "--domain", f"d={text['digits']}",
    )  # fmt: skip
    assert shown == 0
    lines = capsys.readouterr().out.splitlines()
    (warning,) = (line for line in lines if line.startswith("warning: "))
    assert "`p` is judged on" in warning
    assert "`seen`" in warning
    assert "--fold choose" in warning


def test_the_bank_is_filled_once(
    model: str, text: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets, domains = {"own": text["prose"]}, {"p": text["prose"]}
    first = ask(model, sets, domains)
    named = ask(model, sets, domains, bank=tmp_path / "bank")
    assert named.bank.folder == tmp_path / "bank"

    def fails(*_a: Any, **_k: Any) -> None:
        raise AssertionError("another pass")

    monkeypatch.setattr(bank_build.engine, "dense_pass", fails)
    assert ask(model, sets, domains).transfer == first.transfer
    assert ask(model, sets, domains, bank=tmp_path / "bank").transfer == first.transfer
    # Another strength of the same method needs no other statistics.
    assert ask(model, sets, domains, sparsity=0.7).bank.folder == first.bank.folder
    with pytest.raises(AssertionError, match="another pass"):
        ask(model, {"own": text["digits"]}, domains)
    with pytest.raises(UserError, match="belongs to another bank") as caught:
        ask(model, {"own": text["digits"]}, domains, bank=tmp_path / "bank")
    assert caught.value.argument == "bank"


def test_the_command_prints_and_writes_the_same(
    model: str, text: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answer"
    code = command(
        "preflight", WANDA, "--pretrained", model, "--out", str(out), "--judged", "4",
        "--bank", str(tmp_path / "bank"),
        "--set", f"prose={text['prose']}", "--set", "dots=null:ellipsis",
        "--domain", f"p={text['prose']}",
    )  # fmt: skip
    assert code == 0
    shown = capsys.readouterr().out
    plots = ["preflight.png"] if importlib.util.find_spec("matplotlib") else []
    names = sorted(file.name for file in out.iterdir())
    assert names == ["preflight.json", *plots, "preflight.txt"]
    assert (out / "preflight.txt").read_text() == shown
    plain = json.loads((out / "preflight.json").read_text())
    assert [(e["set"], e["domain"]) for e in plain["transfer"]["entries"]] == [
        ("prose", "p"),
        ("dots", "p"),
    ]
    fields = {"error", "regret", "against_no_data", "worst", "worst_layer", "transfers"}
    assert fields <= set(plain["transfer"]["entries"][0])
    rows = {line.split()[0]: line for line in shown.splitlines() if line[:1].isalpha()}
    assert "1.00 (" in rows["prose"]
    dots = plain["transfer"]["entries"][1]
    cell = f"{dots['regret']:.2f} ({dots['against_no_data']:.2f})"
    assert cell in rows["dots"]
    assert rows["dots"].rstrip().endswith("!") == (not dots["transfers"])
    assert f"advice: {plain['transfer']['advice']}" in shown
    assert plain["overlap"] == {"prose": {"p": 0.0}, "dots": {"p": 0.0}}


def test_a_mixture_is_judged_with_the_ridge_of_all(
    model: str, text: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_calib_plugin.bank import searched

    asked: list[bool] = []
    real = searched.search_mix

    def found(*args: Any, search_damp: bool, **more: Any) -> Any:
        asked.append(search_damp)
        return real(*args, search_damp=search_damp, **more)

    monkeypatch.setattr(searched, "search_mix", found)
    mix = f"minimax({text['prose']}+{text['digits']})"
    ask(model, {"mix": mix}, {"p": text["prose"]}, method="sparsegpt")
    assert asked == [False]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"method": "magnitude"}, "method", "uses no calibration data"),
    ({"sparsity": 0}, "method", "no weight is changed"),
    ({"calibration": "random"}, "calibration", "the recipe names random; .*--set NAME=EXPR"),
    ({"fold": "choose"}, "fold", "drop `fold`"),
    ({"sets": {}}, "set", "none given"),
    ({"domains": {}}, "domain", "none given"),
    ({"sets": {"x": "slef"}}, "set", "did you mean `self`"),
    ({"sets": {"x": "none"}}, "set", "needs calibration data"),
    ({"sets": {"x": "file:/nowhere.txt"}}, "set", "no file or folder"),
    ({"sets": {"x": "minimax(random)"}}, "set", "has 1 source"),
    ({"sets": {"x": "set:/nowhere"}}, "set", "/nowhere"),
    ({"domains": {"x": "slef"}}, "domain", "did you mean `self`"),
    ({"domains": {"x": "set:{set}"}}, "domain", "x=set:.* is a finished set"),
    ({"domains": {"x": "set:{set}+random"}}, "domain", "is a finished set"),
    ({"domains": {"x": "minimax(random+null:ascii)"}}, "domain", "is a mixture"),
    ({"out": "{file}"}, "out", "is a file; name a folder"),
    ({"bank": "{file}/deeper"}, "bank", "is a file; name a folder"),
]


@pytest.mark.parametrize(("given", "argument", "message"), BAD, ids=lambda v: str(v)[:50])
def test_mistakes_load_nothing(
    given: dict[str, Any],
    argument: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    CalibrationSet.of([[3, 4, 5]] * 8, seqlen=3).save(tmp_path / "set")
    (tmp_path / "file").write_text("mine")
    places = {"set": str(tmp_path / "set"), "file": str(tmp_path / "file")}

    def loaded(*_a: Any, **_k: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", loaded)
    filled = {"sets": {"r": "random"}, "domains": {"d": "random"}} | given
    for name, value in filled.items():
        if name in ("sets", "domains"):
            filled[name] = {key: text.format(**places) for key, text in value.items()}
        elif name in ("out", "bank"):
            filled[name] = Path(value.format(**places))
    with pytest.raises(UserError, match=message) as caught:
        ask("no/model", **filled)
    assert caught.value.argument == argument
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "c4", "--domain", "x=random"], "set: got 'c4'; NAME=EXPR"),
        (["--set", "=c4", "--domain", "x=random"], "set: got '=c4'; NAME=EXPR"),
        (["--set", "a=", "--domain", "x=random"], "set: got 'a='; NAME=EXPR"),
        (["--set", "a=c4", "--set", "a=random", "--domain", "x=c4"], "set: `a` is given twice"),
        (["--set", "a=c4", "--domain", "x"], "domain: got 'x'; NAME=EXPR"),
        (["--set", "a=c4", "--domain", "x=c4", "--domain", "x=c4"], "domain: `x` is given twice"),
    ],
)
def test_mistakes_of_the_command_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("preflight", WANDA, "--pretrained", "no/model", *options) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert len(shown.splitlines()) == 1


def test_a_set_of_another_tokenizer_is_refused(
    model: str, text: dict[str, str], tmp_path: Path
) -> None:
    other = make_tokenizer()
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path / "tokenizer")
    out, tokenizer = str(tmp_path / "set"), str(tmp_path / "tokenizer")
    flags = ["--nsamples", "4", "--seqlen", "12", "--tokenizer", tokenizer]
    command("calibrate", text["prose"], "--pretrained", model, "--out", out, *flags)
    with pytest.raises(UserError, match="was made with tokenizer"):
        ask(model, {"s": f"set:{out}"}, {"p": text["prose"]})
