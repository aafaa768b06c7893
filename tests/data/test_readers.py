"""`read`: what is accepted, what is refused, and that every refusal names file, line, column and text."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from intarsia.data import FORMATS, Limits, Table, read
from intarsia.errors import DataError, IntarsiaError, SpecError, UsageError

TRAPS = ["nan", "NA", "None", "no", "on", "007", "1e5", "TRUE", "12:30", "-0", "inf", " x "]


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, message: str, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)  # type: ignore[arg-type]
    assert message in str(caught.value), str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_importing_data_imports_no_torch() -> None:
    code = "import sys, intarsia.data; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# formats


@pytest.mark.parametrize("suffix, separator", [("csv", ","), ("tsv", "\t")])
def test_strings_stay_strings(tmp_path: Path, suffix: str, separator: str) -> None:
    path = put(tmp_path, f"t.{suffix}", "".join(f"{a}{separator}{b}\n" for a, b in zip(["text", *TRAPS], ["label", *TRAPS])))
    table = read(path)
    assert table["text"] == table["label"] == tuple(TRAPS)
    assert table.lines == tuple(range(2, 2 + len(TRAPS))) and table.where(0) == f"{path}:2"


def test_csv_follows_rfc4180(tmp_path: Path) -> None:
    path = put(tmp_path, "t.csv", 'text,label\n"a, ""b""\r\nc",x\n,""\n"\u2028",y\n')
    table = read(path)
    assert table["text"] == ('a, "b"\r\nc', "", "\u2028") and table["label"] == ("x", "", "y")
    assert table.lines == (2, 4, 5), "a record that spans lines counts from its first"


def test_tsv_quotes_are_text(tmp_path: Path) -> None:
    path = put(tmp_path, "t.tsv", 'text\tlabel\n"he said\t1\n" ok "" \t2\n')
    assert read(path)["text"] == ('"he said', '" ok "" ')
    refused(path, ":3:2: text after a closing quote (the field opens in line 2, column 1)", quoting=True)
    assert read(put(tmp_path, "q.tsv", 'a\tb\n"x\ty"\tz\n'), quoting=True)["a"] == ("x\ty",)
    assert read(put(tmp_path, "q.csv", 'a,b\n"x,y\n'), quoting=False)["a"] == ('"x',)
    assert read(put(tmp_path, "s.csv", "a;b\nx,y;z\n"), delimiter=";")["a"] == ("x,y",)


def test_columns_are_chosen_renamed_and_named(tmp_path: Path) -> None:
    path = put(tmp_path, "t.tsv", "id\tsentence\tlabel\n1\tx\ty\n")
    assert read(path, columns=["label"]).names == ("label",)
    for columns in ({"text": "sentence", "y": 2}, "text=sentence,y=label"):
        table = read(path, columns=columns)
        assert table.names == ("text", "y") and table[0] == {"text": "x", "y": "y"}
    bare = put(tmp_path, "bare.tsv", "gj04\t1\t\tGo.\n")
    assert read(bare, header=False, columns="source,label,note,text")[0] == {"source": "gj04", "label": "1", "note": "", "text": "Go."}
    assert read(bare, header=False, columns="text=3,label=1")[0] == {"text": "Go.", "label": "1"}
    assert read(bare, header=False, columns={"text": -1})[0] == {"text": "Go."}
    refused(bare, "4 fields, but columns= names 2", header=False, columns="text,label")
    refused(bare, "no field 7", header=False, columns="text=7")
    with pytest.raises(UsageError, match="must give positions"):
        read(bare, header=False, columns="text=3,label=y")
    with pytest.raises(UsageError, match="needs its columns named"):
        read(bare, header=False)


def test_a_missing_column_suggests_the_nearest(tmp_path: Path) -> None:
    path = put(tmp_path, "t.csv", "sentence,lable\nx,y\n")
    message = refused(path, "no column 'label'; did you mean 'lable'?", columns="sentence,label")
    assert "t.csv:1:" in message and "'sentence'" in message
    refused(put(tmp_path, "n.csv", ",text\n0,x\n"), "column 1 of 2 has no name in the header")
    assert read(tmp_path / "n.csv", columns="text")["text"] == ("x",)
    refused(put(tmp_path, "d.csv", "a,b,a\n0,x,y\n"), "the header has 'a' more than once")


def test_jsonl(tmp_path: Path) -> None:
    path = put(tmp_path, "t.jsonl", '{"text": "a\\u2028\\n", "tokens": ["x", "y"]}\r\n{"tokens": [], "text": "\\ud83d\\ude00"}\n\n')
    table = read(path)
    assert table["text"] == ("a\u2028\n", "😀") and table["tokens"] == (("x", "y"), ()) and table.lines == (1, 2)


def test_jsonl_numbers_only_where_declared_and_as_written(tmp_path: Path) -> None:
    path = put(tmp_path, "t.jsonl", '{"text": "a", "y": 1.50, "ok": true}\n{"text": "b", "y": -2e3, "ok": false}\n')
    assert read(path, columns="text,y", numeric=["y"])["y"] == ("1.50", "-2e3")
    message = refused(path, ":1:15: 'y' is a number; write it as \"1.50\" in quotes", columns="text,y")
    assert "--numeric y" in message
    refused(path, "'ok' is a boolean: write it in quotes", columns="text,ok", numeric=["ok"])
    with pytest.raises(UsageError, match="numeric='z' is not a column"):
        read(path, columns="text", numeric=["z"])
    with pytest.raises(UsageError, match="keys, not positions"):
        read(path, columns={"text": 0})


JSON_FAULTS = {
    '{"text": "a"': "not JSON",
    '["a"]': "object was expected, this is a list",
    '"a"': "object was expected, this is a string",
    '{"text": "a", "text": "b"}': "the key 'text' occurs twice",
    '{"text": null}': "'text' is a null",
    '{"text": {"a": "b"}}': "'text' is a object",
    '{"text": ["a", 1]}': "'text' is a list with a number in it",
    '{"text": ["a", "b"]}': "'text' is a list, in the rows before it is a string",
    '{"text": NaN}': "NaN is not JSON",
    '{"test": "a"}': "is not in the first row",
    "{}": "no key 'text'",
    '{"text": "\\ud800"}': "half of a surrogate pair",
    '{"text": "\\u0000"}': "NUL",
    '{"text": ' + "[" * 100_000: "nested too deeply",
    "": "a blank line between rows",
}


@pytest.mark.parametrize("line", JSON_FAULTS, ids=lambda line: line[:30])
def test_malformed_json_names_the_line(tmp_path: Path, line: str) -> None:
    path = put(tmp_path, "t.jsonl", f'{{"text": "first"}}\n{line}\n{{"text": "last"}}\n')
    message = refused(path, JSON_FAULTS[line])
    assert f"{path}:2" in message and "--skip-bad" in message
    table = read(path, skip_bad=1)
    assert table["text"] == ("first", "last") and table.skipped == 1 and f"{path}:2" in table.bad[0]


def test_conll(tmp_path: Path) -> None:
    path = put(tmp_path, "t.conll", "-DOCSTART- O\n\n# O\nMr.  B-PER \n\n\n\u00a0x O\n")
    table = read(path)
    assert table["tokens"] == (("#", "Mr."), ("\u00a0x",)) and table["tags"] == (("O", "B-PER"), ("O",))
    assert table.lines == (3, 7)
    tabs = put(tmp_path, "t.bio", "New York\tNNP\tB-LOC\n-\t:\tO\n")
    assert read(tabs)["tokens"] == (("New York", "-"),) and read(tabs)["tags"] == (("B-LOC", "O"),)
    assert read(tabs, columns={"tokens": 0, "pos": 1}).names == ("tokens", "pos")
    assert read(tabs, columns="tokens,pos,tags")["pos"] == (("NNP", ":"),)
    refused(put(tmp_path, "one.conll", "a\nb\n"), "one column, a token and a tag were expected")


def test_one_bad_line_is_one_bad_sentence(tmp_path: Path) -> None:
    path = put(tmp_path, "t.conll", "a O\n\nb O\nc\n\nd O\n")
    assert "t.conll:4:1: 1 column where 2 were expected" in refused(path, "found: 'c'")
    table = read(path, skip_bad=1)
    assert table["tokens"] == (("a",), ("d",)) and table.skipped == 1
    refused(put(tmp_path, "c.conll", "a O\n\n# sent_id = 3\nb O\n"), "comments are known to --format iob2 and conllu only")
    refused(put(tmp_path, "e.conll", "a\tO\n\nb\t\n"), ":3:1: column 2 is empty")


CONLLU = """# sent_id = s1
# text = vámonos al
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tvamos\tir\tVERB\t_\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\t_
2.1\tx\t_\t_\t_\t_\t_\t_\t_\t_
3\ta l\ta\tADP\t_\t_\t1\tcase\t_\t_

"""


def test_conllu_reads_words(tmp_path: Path) -> None:
    path = put(tmp_path, "t.conllu", CONLLU)
    table = read(path)
    assert table["tokens"] == (("vamos", "nos", "a l"),) and table["tags"] == (("VERB", "PRON", "ADP"),)
    full = read(path, columns="lemma,head,text,id=sent_id")
    assert full[0] == {"lemma": ("ir", "nosotros", "a"), "head": ("0", "1", "1"), "text": "vámonos al", "id": "s1"}
    refused(put(tmp_path, "g.conllu", CONLLU.replace("3\ta l", "4\ta l")), ":7:1: the number of the token was expected to be 3")
    refused(put(tmp_path, "c.conllu", CONLLU.replace("# sent_id = s1\n", "")), "no comment '# sent_id", columns="sent_id")
    refused(put(tmp_path, "r.conllu", CONLLU.replace("\troot\t_", "\troot")), "9 columns where 10")
    refused(path, "no column 'uppos'; did you mean 'upos'?", columns="tokens=form,tags=uppos")


def test_iob2(tmp_path: Path) -> None:
    path = put(tmp_path, "t.iob2", "# text = Oslo #\n1\tOslo\tB-LOC\n2\t#\tO\n\n")
    table = read(path)
    assert table[0] == {"tokens": ("Oslo", "#"), "tags": ("B-LOC", "O")}
    assert read(path, columns="text,tags=2")[0] == {"text": "Oslo #", "tags": ("B-LOC", "O")}
    with pytest.raises(UsageError, match="positions or sent_id or text"):
        read(path, columns="tokens,tags")
    refused(put(tmp_path, "two.iob2", "Oslo\tB-LOC\n"), "no line has a number, a token and a tag")


def test_text_keeps_every_line(tmp_path: Path) -> None:
    path = put(tmp_path, "t.txt", "a\u2028b\x85c\x0b\x0cd\x1c\n\n nan \n")
    assert read(path)["text"] == ("a\u2028b\x85c\x0b\x0cd\x1c", "", " nan ")
    assert read(path, columns=["sentence"]).names == ("sentence",)
    with pytest.raises(UsageError, match="may only name them"):
        read(path, columns="a,b")


def test_parallel(tmp_path: Path) -> None:
    one, two = put(tmp_path, "t.quy", "a\nb\n"), put(tmp_path, "t.es", "c\r\nd")
    table = read([one, two])
    assert table["source"] == ("a", "b") and table["target"] == ("c", "d") and table.where(1) == f"{one}:2"
    assert read([one, two], columns="quy,es").names == ("quy", "es")
    both = put(tmp_path, "t.tsv", "a\tc\nb\td\n")
    assert read(both, format="parallel")["target"] == ("c", "d")
    assert read(both, format="parallel", header=True).names == ("a", "c")
    short = put(tmp_path, "s.es", "c\n")
    with pytest.raises(DataError, match=r"t\.quy has 2, .*s\.es has 1"):
        read([one, short])
    put(tmp_path, "n.es", "c\nd\0\n")
    with pytest.raises(DataError, match=r"t\.quy:2:2: in .*n\.es: NUL"):
        read([one, tmp_path / "n.es"])
    assert len(read([one, tmp_path / "n.es"], skip_bad=1)) == 1, "a bad line takes its partner with it"
    refused(put(tmp_path, "three.tsv", "a\tb\tc\nd\te\tf\n"), "3 fields, but columns= names 2", format="parallel")
    with pytest.raises(UsageError, match=r"reads 1 file\(s\) at a time"):
        read([one, two], format="text")


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a\nb\n")))
    table = read("-", format="text")
    assert table["text"] == ("a", "b") and table.where(1) == "<stdin>:2"


# bytes, lines, characters


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_bom_and_line_ends_change_nothing(tmp_path: Path, end: str, bom: bytes, last: bool) -> None:
    content = end.join(["text\tlabel", "a\u2028\x85\tx", "b\ty"]) + end * last
    table = read(put(tmp_path, "t.tsv", bom + content.encode()))
    assert table.names == ("text", "label") and table["text"] == ("a\u2028\x85", "b") and table["label"] == ("x", "y")


def test_a_stray_carriage_return_is_an_error(tmp_path: Path) -> None:
    for name, content in [("t.tsv", "a\nx\ry\n"), ("t.txt", "a\nx\ry\n"), ("t.csv", "a\nx\ry\n"), ("t.conll", "a O\nx\ry O\n")]:
        refused(put(tmp_path, name, content), ":2:2: a carriage return inside a line")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1", "cp1252", "utf-8-sig"])
def test_other_encodings_only_when_said(tmp_path: Path, encoding: str) -> None:
    path = put(tmp_path, "t.txt", "Größe\nnaïve\n".encode(encoding))
    assert read(path, encoding=encoding)["text"] == ("Größe", "naïve")
    if encoding != "utf-8-sig":
        with pytest.raises(DataError, match="--encoding"):
            read(path)


def test_a_bad_byte_is_named(tmp_path: Path) -> None:
    path = put(tmp_path, "t.txt", "ä\nabc".encode() + b"\xe4x\n")
    message = refused(path, "t.txt:2:4: byte 6 (0xe4) is not utf-8")
    assert "--encoding cp1252" in message and "\\xe4" in message
    refused(put(tmp_path, "u.txt", "ab".encode("utf-16")), "--encoding utf-16")
    with pytest.raises(UsageError, match="'klingon' is not a text encoding"):
        read(path, encoding="klingon")
    with pytest.raises(UsageError, match="'hex' is not a text encoding"):
        read(path, encoding="hex")


def test_normalisation(tmp_path: Path) -> None:
    path = put(tmp_path, "t.csv", "te\u0301xt,label\ne\u0301,x\nﬁ\uff0c,y\nplain,z\n")
    table = read(path, columns="t\u00e9xt,label")
    assert table.names == ("téxt", "label") and table["téxt"] == ("é", "ﬁ\uff0c", "plain") and table.renormalised == 1
    assert read(path, normalise="none")["te\u0301xt"][0] == "e\u0301"
    assert read(path, normalise="NFD")["te\u0301xt"][0] == "e\u0301"
    wide = read(path, normalise="NFKC")
    assert wide["téxt"][1] == "fi,", "a comma made by NFKC is not a separator"
    assert read(put(tmp_path, "q.csv", "a;b\n\u037e;x\n"), delimiter=";")["a"] == (";",), "nor a semicolon made by NFC"
    with pytest.raises(UsageError, match="'NFX' is not one of"):
        read(path, normalise="NFX")


def test_json_keys_that_become_equal(tmp_path: Path) -> None:
    path = put(tmp_path, "t.jsonl", '{"\u00e9": "a", "e\u0301": "b"}\n{"\u00e9": "a"}\n')
    refused(path, "two keys are the same after NFC")
    assert read(path, normalise="none", skip_bad=1).names == ("\u00e9", "e\u0301")


# faults


FAULTS = {
    "more fields": ("t.tsv", "a\tb\nx\ty\nx\ty\tz\n", "t.tsv:3:5: 3 fields where the first line has 2; found: 'x\\ty\\tz'"),
    "fewer fields": ("t.tsv", "a\tb\nx\n", "t.tsv:2:2: 1 field where the first line has 2"),
    "fewer fields in csv": ("t.csv", 'a,b,c\n"x",y\n', "t.csv:2:6: 2 fields where the first line has 3"),
    "blank line": ("t.tsv", "a\tb\n\nx\ty\n", "t.tsv:2:1: a blank line between rows"),
    "open quote": ("t.csv", 'a,b\n1,2\nx,"y\n', "t.csv:3:3: unbalanced quote: it is never closed"),
    "text after quote": ("t.csv", 'a,b\n"x\nz"y,2\n', "t.csv:3:3: text after a closing quote (the field opens in line 2, column 1)"),
    "quote in field": ("t.csv", 'a,b\n1,x"y\n', "t.csv:2:4: a quote inside an unquoted field"),
    "NUL": ("t.csv", "a,b\n1,x\0\n", "t.csv:2:4: NUL character"),
    "NUL in text": ("t.txt", "ab\0\n", "t.txt:1:3: NUL character"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_line_column_and_text(tmp_path: Path, fault: str) -> None:
    name, content, message = FAULTS[fault]
    refused(put(tmp_path, name, content), message)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.tsv", "", "the file is empty"),
        ("t.tsv", "\ufeff", "nothing but a byte order mark"),
        ("t.tsv", "a\tb\n", "a header ('a', 'b') and no rows"),
        ("t.csv", "a,b\n\n\n", "and no rows"),
        ("t.jsonl", "\n", "no line is a JSON object"),
        ("t.conll", "-DOCSTART- -X- O O\n\n", "one column"),
        ("t.conllu", "# newdoc\n\n", "no rows"),
    ],
)
def test_files_without_rows(tmp_path: Path, name: str, content: str, message: str) -> None:
    refused(put(tmp_path, name, content), message)


def test_skip_bad_counts_and_has_a_limit(tmp_path: Path) -> None:
    path = put(tmp_path, "t.csv", 'a,b\n1,2\nbad\n3,"4\n5,6\n7,8,9\n')
    table = read(path, skip_bad=3)
    assert table["a"] == ("1", "5") and table.skipped == 3
    assert [message.split(": ")[0] for message in table.bad] == [f"{path}:{place}" for place in ("3:4", "4:3", "6:5")]
    assert "malformed row 3, --skip-bad 2 allows 2" in refused(path, "t.csv:6", skip_bad=2)
    refused(put(tmp_path, "all.csv", "a,b\nbad\n"), "no rows left, 1 were malformed", skip_bad=5)
    with pytest.raises(UsageError, match="must not be negative"):
        read(path, skip_bad=-1)


def test_limits(tmp_path: Path) -> None:
    path = put(tmp_path, "t.tsv", "a\tb\n" + "x" * 100 + "\ty\n")
    refused(path, ":2: the line has 102 characters, the limit is 50", limits=Limits(line_chars=50))
    refused(path, "107 bytes, the limit is 20", limits=Limits(file_bytes=20))
    refused(put(tmp_path, "f.tsv", "a\tb\nx\ty\tz\n"), "3 fields, the limit is 2", limits=Limits(fields=2))
    refused(put(tmp_path, "f.jsonl", '{"a": "1"}\n{"a": "", "b": "", "c": ""}\n'), "3 keys, the limit is 2", limits=Limits(fields=2))
    refused(put(tmp_path, "t.conll", "a O\n\n" + "b O\n" * 9), "a sentence of 9 tokens, the limit is 5", limits=Limits(tokens=5))
    refused(put(tmp_path, "q.csv", 'a,b\nx,"y\n' + "z\n" * 99), "not closed within 50 characters", limits=Limits(line_chars=50))


def test_missing_files_and_unknown_formats(tmp_path: Path) -> None:
    put(tmp_path, "train.tsv", "a\nb\n")
    refused(tmp_path / "trian.tsv", "no such file; did you mean 'train.tsv'?")
    refused(tmp_path / "no" / "train.tsv", "no such file")
    folder = tmp_path / "folder.tsv"
    folder.mkdir()
    refused(folder, "cannot be read")
    with pytest.raises(UsageError, match="does not say which format"):
        read(tmp_path / "train")
    with pytest.raises(UsageError, match="--format jsonl"):
        read(tmp_path / "train.json")
    with pytest.raises(SpecError, match=r"unknown format 'tvs'; did you mean 'tsv'\?"):
        read(tmp_path / "train.tsv", format="tvs")


def test_an_option_that_means_nothing_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, "t.txt", "a\n")
    for options in ({"header": True}, {"quoting": False}, {"delimiter": ","}, {"numeric": ["a"]}):
        with pytest.raises(UsageError, match="means nothing to the format 'text'"):
            read(path, **options)  # type: ignore[arg-type]
    for columns in ("", "a,a", "a=", [], {"": 0}):
        with pytest.raises(UsageError, match="not a list of distinct names"):
            read(path, columns=columns)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="delimiter"):
        read(put(tmp_path, "t.csv", "a\nb\n"), delimiter=";;")


# whatever the bytes: a table or an error on purpose


MARKUP = st.sampled_from(['"', ",", "\t", "\n", "\r", "\r\n", " ", "{", "}", ":", '{"a": "b"}', "\\u0000", "#", "1\t", "1-2", "O", "\0",
                          "\ufeff", "\u2028", "-DOCSTART-", "e\u0301", "\t_" * 8, "\ud83d"])  # fmt: skip
CONTENT = st.one_of(
    st.binary(max_size=60),
    st.lists(st.one_of(MARKUP, st.text(max_size=3)), max_size=25).map(lambda parts: "".join(parts).encode("utf-8", "surrogatepass")),
)


@settings(max_examples=400, deadline=None)
@given(content=CONTENT, kind=st.sampled_from(sorted(FORMATS)), skip=st.integers(0, 2), header=st.sampled_from([None, False]))
@example(content=b'a,b\n"', kind="csv", skip=2, header=None)
@example(content=b"\r\r\n", kind="text", skip=0, header=None)
def test_no_input_ends_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: bytes, kind: str, skip: int, header: bool | None) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(content)
    options = {"header": header} if "header" in FORMATS[kind].takes else {}
    columns = "a,b" if header is False and kind in ("csv", "tsv") else None
    try:
        table = read(path, format=kind, skip_bad=skip, columns=columns, **options)  # type: ignore[arg-type]
    except IntarsiaError as error:
        assert str(error)
    else:
        assert isinstance(table, Table) and len(table) and table.skipped <= skip
        assert table.digest == read(path, format=kind, skip_bad=skip, columns=columns, **options).digest  # type: ignore[arg-type]
