"""Chat templates on request."""

from __future__ import annotations

import json

import pytest
from conftest import draw, numbered, word_tokenizer, write_jsonl

from lm_calib_plugin.calibration.chat import ChatWriter, Exchange, messages_of
from lm_calib_plugin.calibration.sources.base import Document
from lm_calib_plugin.calibration.tokens import encode
from lm_calib_plugin.errors import UserError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "{{ ' w58 ' if m['role'] == 'user' else ' w59 ' }}{{ m['content'] }}{% endfor %}"
)


@pytest.fixture(params=[False, True], ids=["plain", "start-token"])
def chat_tokenizer(request):
    tokenizer = word_tokenizer(start_token=request.param)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("w1\nw2\nw3", [("user", "w1"), ("assistant", "w2\nw3")]),
        ("w1 w2", [("user", "w1 w2")]),
        ("\n w1 \n\n w2\n", [("user", "w1"), ("assistant", "w2")]),
    ],
)
def test_a_text_becomes_one_exchange(text, messages):
    assert [(m["role"], m["content"]) for m in messages_of(text)] == messages


def test_messages_are_kept_as_they_are():
    given = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}]
    text = Exchange.of(given)
    assert text == "a\nb\n\nc"
    assert list(messages_of(text)) == given
    assert Exchange.of(given, "a b c") == "a b c"


def test_rows_hold_one_start_token_and_the_roles(chat_tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["w1\nw2 w3"] * 5)
    drawn = draw(f"file:{path}", chat_tokenizer, pack="pad", chat_template=True)
    bos = chat_tokenizer.bos_token_id
    expected = [bos, *encode(chat_tokenizer, "w58 w1 w59 w2 w3")]
    assert [ids.tolist() for ids in drawn.sequences] == [expected] * 4
    record = drawn.sources[0]["chat_template"]
    assert record["split_at_first_line"] == 4
    assert (record["with_messages"], record["user_only"]) == (0, 0)
    assert len(record["template"]) == 64


def test_records_of_messages_are_written_by_the_template(chat_tokenizer, tmp_path):
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}] * 2
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    drawn = draw(
        f"file:{path}?column=messages",
        chat_tokenizer,
        pack="pad",
        chat_template=True,
        nsamples=1,
        seqlen=20,
    )
    expected = encode(chat_tokenizer, "<s> w58 w1 w59 w2 w58 w1 w59 w2")
    assert drawn.sequences[0].tolist() == expected[-9:]
    assert drawn.sources[0]["chat_template"]["with_messages"] == 1
    plain = draw(
        f"file:{path}?column=messages", chat_tokenizer, pack="longdoc", nsamples=1, seqlen=3
    )
    assert 61 not in plain.sequences[0].tolist()


def test_the_fold_is_that_of_the_text_before_it_is_written(chat_tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbered(60, 20))
    for fold in ("choose", "judge"):
        plain = draw(f"file:{path}", chat_tokenizer, pack="pad", fold=fold)
        written = draw(f"file:{path}", chat_tokenizer, pack="pad", fold=fold, chat_template=True)
        assert plain.sources[0]["indices"] == written.sources[0]["indices"]
        assert plain.calib_id != written.calib_id


def test_the_model_writes_enough_for_what_the_template_makes(stories, monkeypatch):
    tokenizer = stories.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}", raising=False)
    size = stories.model.config.vocab_size
    given = {"nsamples": 2, "vocab_size": size, "model_id": "m"}
    expression = "self?prefix_tokens=1&batch_size=8&dedup=0"
    first = draw(expression, tokenizer, stories.model, **given)
    second = draw(expression, tokenizer, stories.model, chat_template=True, **given)
    assert "chat_template" in second.sources[0]
    assert "chat_template" not in first.sources[0]
    assert len(second.sequences) == 2


def test_a_tokenizer_without_template_is_refused(words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbered(9, 20))
    with pytest.raises(UserError, match="chat_template: the tokenizer has no chat template"):
        draw(f"file:{path}", words, chat_template=True)


def test_what_the_template_refuses_is_said(chat_tokenizer):
    writer = ChatWriter(chat_tokenizer)
    text = Exchange.of([{"role": "tool", "content": "w1"}])
    with pytest.raises(UserError, match=r"refuses a document: .*no such role"):
        list(writer([Document(0, text)]))


def test_empty_documents_stay_empty(chat_tokenizer):
    writer = ChatWriter(chat_tokenizer)
    assert [d.text for d in writer([Document(0, " "), Document(1, "")])] == [" ", ""]
    assert sum(writer.counts.values()) == 0
