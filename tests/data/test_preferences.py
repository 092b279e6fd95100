"""Judged answers of every form, what is shown of them, and what is refused by file and line."""

import json
from collections import Counter

import pytest
from small import tokenizer

from deepseek_jax.data.preferences import pack_items, read_items, read_judged, shown

TEXT = tokenizer()
PAIR = {"prompt": "1+2=", "chosen": "<think>\nb\n</think>\n\n3", "rejected": "<think>\na\n</think>\n\n4"}


def read(tmp_path, *rows, **options):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"judges": "summary", "seq_len": 64, "positions": 40} | options
    return read_items(tmp_path / "pairs.jsonl", TEXT, **given)


def texts(item):
    return [TEXT.decode(ids, skip_special_tokens=False) for ids in (item.better, item.worse)]


def test_the_summary_is_shown_alone_or_all(tmp_path):
    (summary,), (everything,) = read(tmp_path, PAIR), read(tmp_path, PAIR, judges="all")
    asked, end = "<｜begin▁of▁sentence｜><｜User｜>1+2=<｜Assistant｜>", "<｜end▁of▁sentence｜>"
    assert texts(summary) == [f"{asked}3{end}", f"{asked}4{end}"]
    assert texts(everything) == [f"{asked}{PAIR[name]}{end}" for name in ("chosen", "rejected")]
    assert shown("no thought", "summary") == "no thought" and shown("<think>never ends", "summary") == ""


def test_forms_of_the_same_pair(tmp_path):
    ask, said = {"role": "user", "content": "1+2="}, lambda text: {"role": "assistant", "content": text}
    forms = (
        {"messages": [ask], "chosen": "3", "rejected": "4"},
        {"prompt": [ask], "chosen": [said("3")], "rejected": [said("4")]},
        {"prompt": None, "chosen": [ask, said("3")], "rejected": [ask, said("4")]},
    )
    assert len({str(read(tmp_path, form)) for form in (PAIR, *forms)}) == 1


def test_single_answers_are_good_or_bad(tmp_path):
    for label, good in ((1, True), ("safe", True), (0, False), ("unsafe", False)):
        judged = read_judged({"prompt": "1+2=", "response": "3", "label": label})
        assert (judged.better is None, judged.worse is None) == (not good, good)
        (item,) = read(tmp_path, {"prompt": "1+2=", "response": "3", "label": label})
        (row,) = pack_items([item], 24, pad_id=2)
        length = item.length
        assert {*row["segment_ids"][:length]} == {1 if good else 2} and not row["segment_ids"][length:].any()
        assert row["loss_mask"].nonzero()[0].tolist() == [length - 1]


def test_rows_hold_whole_items(tmp_path):
    found = read(tmp_path, *[PAIR] * 3, {"prompt": "1+2=", "response": "3", "label": 1})
    rows = pack_items(found, 2 * found[0].length + 1, pad_id=2)
    assert [{*row["segment_ids"].tolist()} for row in rows] == [{1, 2, 3, 4, 0}, {1, 2, 3, 0}]
    assert [int(row["loss_mask"].sum()) for row in rows] == [4, 3]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "no chosen with rejected, nor response with label; it has prompt, chosen"),
        ({"chosen": "b", "rejected": "c"}, '"chosen" must end in an answer to something'),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, '"prompt" is of type int'),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, '"chosen" is of type int'),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "both answers are 'b'"),
        (PAIR | {"rejected": "<think>\nother\n</think>\n3"}, "once their thoughts are left out"),
        (PAIR | {"rejected": "<think>\nnever ends"}, "the rejected answer says nothing after its thought"),
        ({"prompt": "a", "response": "b", "label": "good"}, "\"label\" is 'good'"),
        ({"prompt": "a", "response": "b", "label": 2}, '"label" is 2'),
        ({"prompt": "a", "response": " ", "label": 1}, "the judged answer says nothing"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "chosen": "c",
          "rejected": "d"}, '"messages" ends in an answer'),
        ([], "a list; each line must be an object"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_by_its_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: ") as error:
        read(tmp_path, PAIR, row)
    assert message in str(error.value)
    skipped = Counter()
    assert len(read(tmp_path, PAIR, row, skip_broken=True, skipped=skipped)) == 1 and skipped.total() == 1


def test_long_answers_are_refused_or_left_out(tmp_path):
    for options, message in (({"seq_len": 9}, "data.seq_len=9"), ({"positions": 4}, "max_position_embeddings=4")):
        with pytest.raises(ValueError, match=f"pairs.jsonl:1: .* tokens, where {message}; --data.drop-long"):
            read(tmp_path, PAIR, skip_broken=True, **options)
        skipped = Counter()
        assert read(tmp_path, PAIR, drop_long=True, skipped=skipped, **options) == []
        assert skipped == {"too long": 1}
