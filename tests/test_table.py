"""Tables in and out, and every way in which one can be bad."""

import io
import json
import pickle
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from gdjax.table import TableError, label_column, number_column, read_table, write_table

ENDINGS = [".csv", ".parquet", ".npz"]
SHOPS = {
    "shop": ["north", 'sou"th', "Zürich, \nold town", "north"],
    "day": np.array([1, 2, 3, 4], np.int32),
    "file": np.array([0.1 + 0.2, -1e-300, 1e22, 5.0]),
}


def csv_file(folder, text, name="table.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def numbers(folder, *entries):
    return number_column(
        read_table(csv_file(folder, "x,y\n" + "".join(f"{e},0\n" for e in entries)), ["x"]), "x"
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_read_back_exactly(tmp_path, ending):
    path = tmp_path / f"shops{ending}"
    write_table(path, SHOPS)
    table = read_table(path, list(SHOPS))
    np.testing.assert_array_equal(number_column(table, "day"), SHOPS["day"])
    np.testing.assert_array_equal(number_column(table, "file"), SHOPS["file"])
    labels, codes = label_column(table, "shop")
    assert labels.to_pylist() == SHOPS["shop"][:3]
    assert codes.tolist() == [0, 1, 2, 0]


def test_json_is_a_list_of_rows_and_what_is_not_finite_is_null(tmp_path):
    write_table(tmp_path / "a.json", {"g": ["ä", "b"], "w": [1.5, np.inf], "v": [np.nan, 0.1 + 0.2]})
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert rows == [{"g": "ä", "w": 1.5, "v": None}, {"g": "b", "w": None, "v": 0.1 + 0.2}]


def test_npz_needs_no_pickle_to_be_read(tmp_path):
    write_table(tmp_path / "a.npz", SHOPS)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive["shop"].dtype.kind == "U"
        assert archive["day"].dtype == np.int32


def test_a_csv_header_is_bare_unless_it_must_be_quoted(tmp_path):
    write_table(tmp_path / "a.csv", {"g": [1], "a,b": [2]})
    assert (tmp_path / "a.csv").read_text() == 'g,"a,b"\n1,2\n'


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(pa.ArrowInvalid):
        write_table(tmp_path / "a.csv", {"g": [1, 2], "h": [1]})
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_asked_for_must_be_good(tmp_path):
    path = csv_file(tmp_path, "x,y\n1,text\n2,\n")
    assert number_column(read_table(path, ["x"]), "x").tolist() == [1.0, 2.0]


def test_a_type_is_not_guessed_from_the_first_megabyte(tmp_path):
    count = 300_000
    path = csv_file(tmp_path, "x,y\n" + "1,10\n" * count + "0.5,10\n")
    column = number_column(read_table(path, ["x"]), "x")
    assert len(column) == count + 1
    assert column[-1] == 0.5


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        (["1", " 2.5", "-3e2"], [1, 2.5, -300]),
        (["True", "FALSE", "true"], [1, 0, 1]),
        (['"7"', "8", "+9"], [7, 8, 9]),
    ],
)
def test_numbers_in_text(tmp_path, entries, wanted):
    assert numbers(tmp_path, *entries).tolist() == wanted


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["1", "2", "three", "4"], "column 'x', row 3: 'three' is not a number"),
        (["1,5"[:1], "1.5.2"], "row 2: '1.5.2' is not a number"),
        (["1_000"], "row 1: '1_000' is not a number"),
        (["1", ""], "column 'x', row 2: the value is missing"),
        (["1", "NA", "x"], "row 2: the value is missing"),
        (["1", "2", "nan"], "row 3: nan is not a finite number"),
        (["-inf", "1"], "row 1: -inf is not a finite number"),
        (["1", "1e999"], "row 2"),
    ],
)
def test_what_is_no_number_is_named_by_row_and_column(tmp_path, entries, message):
    with pytest.raises(TableError, match=message):
        numbers(tmp_path, *entries)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1.0, None]), "row 2: the value is missing"),
        (pa.array([1.0, 2.0, np.nan]), "row 3: nan"),
        (pa.array(["1", "b"]), "row 2: 'b' is not a number"),
        (pa.array(["b", "b"]).dictionary_encode(), "row 1: 'b' is not a number"),
        (pa.array([1, 2], pa.date32()), "holds date32"),
    ],
)
def test_what_is_no_number_in_parquet(tmp_path, column, message):
    parquet.write_table(pa.table({"x": column}), tmp_path / "a.parquet")
    with pytest.raises(TableError, match=message):
        number_column(read_table(tmp_path / "a.parquet", ["x"]), "x")


@pytest.mark.parametrize(
    "array",
    [
        np.array([1, 0], bool),
        np.array([1, 0], np.uint8),
        np.array([1, 0], np.float16),
        np.array([1, 0], ">f8"),
        np.array([b"1", b"0"]),
    ],
)
def test_every_kind_of_number_in_npz(tmp_path, array):
    np.savez(tmp_path / "a.npz", x=array)
    assert number_column(read_table(tmp_path / "a.npz", ["x"]), "x").tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["7", "10", "7"], [7, 10]),
        (["007", "10", "007"], ["007", "10"]),
        (["NA", "SE", "NA"], ["NA", "SE"]),
        (["2020-01-01", "1", "2020-01-01"], ["2020-01-01", "1"]),
        (["1.0", "1", "1.0"], ["1.0", "1"]),
    ],
)
def test_labels_keep_their_letters(tmp_path, texts, wanted):
    path = csv_file(tmp_path, "g,x\n" + "".join(f"{text},1\n" for text in texts))
    labels, codes = label_column(read_table(path, ["g"]), "g")
    assert labels.to_pylist() == wanted
    assert codes.tolist() == [0, 1, 0]


@pytest.mark.parametrize("column", [["a", None], ["a", " "], [1.0, np.nan]])
def test_a_missing_label_is_named(column):
    with pytest.raises(TableError, match="column 'g', row 2: the label is missing"):
        label_column(pa.table({"g": pa.array(column)}), "g")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(TableError, match="there is no file"):
        read_table(tmp_path / "absent.csv", ["x"])


def test_a_folder_is_told(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(TableError, match="cannot be read"):
        read_table(tmp_path / "folder.csv", ["x"])


def test_an_unknown_ending_is_told(tmp_path):
    with pytest.raises(TableError, match=r"ending '\.xlsx'; a table to read must be one of \.csv, \.parquet"):
        read_table(csv_file(tmp_path, "x\n1\n", "a.xlsx"), ["x"])
    with pytest.raises(TableError, match=r"ending '\.xlsx'; it must be one of \.csv"):
        write_table(tmp_path / "a.xlsx", {"x": [1]})


def test_a_missing_column_comes_with_the_nearest_and_a_list(tmp_path):
    path = csv_file(tmp_path, "Year,lifeExp\n1,2\n")
    with pytest.raises(
        TableError, match=r"no column 'lifeexp'; did you mean 'lifeExp'\? It has: Year, lifeExp"
    ):
        read_table(path, ["lifeexp"])
    with pytest.raises(TableError, match=r"no column 'population'\. It has"):
        read_table(path, ["population"])
    with pytest.raises(TableError, match="must be separated by commas"):
        read_table(csv_file(tmp_path, "year;lifeExp\n1;2\n"), ["year"])


def test_a_column_that_is_there_twice_is_told(tmp_path):
    with pytest.raises(TableError, match="several columns named 'x'"):
        read_table(csv_file(tmp_path, "x,x\n1,2\n"), ["x"])


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_told(tmp_path, ending, content):
    with pytest.raises(TableError, match="is empty"):
        read_table(csv_file(tmp_path, content, f"a{ending}"), ["x"])


def test_a_table_without_rows_is_told(tmp_path):
    parquet.write_table(pa.table({"x": pa.array([], pa.float64())}), tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", x=np.array([]))
    for path in [csv_file(tmp_path, "x,y\n"), tmp_path / "a.parquet", tmp_path / "a.npz"]:
        with pytest.raises(TableError, match="has no rows"):
            read_table(path, ["x"])


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.csv", b"\x89PNG\r\n\x1a\n\0\0", "a PNG picture"),
        ("a.csv", b"PAR1\0\0", "a Parquet file"),
        ("a.csv", b"<!DOCTYPE html><html>", "a web page"),
        ("a.csv", b"x,y\n1,2\0\n", "a binary file"),
        ("a.parquet", b"x,y\n1,2\n", "a text file"),
        ("a.npz", b"x,y\n1,2\n", "a text file"),
        ("a.npz", b"\x93NUMPY\1\0", "a single NumPy array"),
        ("a.parquet", b"PK\x03\x04\0", "a zip archive"),
    ],
)
def test_a_file_that_is_not_what_its_ending_says(tmp_path, name, content, found):
    with pytest.raises(TableError, match=f"is not .*: by its content it is {found}"):
        read_table(csv_file(tmp_path, content, name), ["x"])


@pytest.mark.parametrize("ending", [".parquet", ".npz"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_a_file_that_was_cut_off_is_told(tmp_path, ending, share):
    path = tmp_path / f"a{ending}"
    write_table(path, SHOPS)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(TableError, match="cannot be read as"):
        read_table(path, ["day"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n3\n", "line 3: Expected 2 columns, got 1"),
        ("x,ä\n1,2\n".encode("latin-1"), "save it as UTF-8"),
        ("x,y\nä,2\n".encode("latin-1"), "save it as UTF-8"),
    ],
)
def test_a_malformed_csv_is_told(tmp_path, text, message):
    with pytest.raises(TableError, match=message):
        read_table(csv_file(tmp_path, text), ["x"])


class Burglar:
    entered = False

    def __reduce__(self):
        return (setattr, (Burglar, "entered", True))


def test_pickled_objects_are_refused_and_never_unpickled(tmp_path):
    array = np.array([Burglar(), Burglar()], dtype=object)
    np.savez(tmp_path / "a.npz", x=np.arange(2.0), g=array)
    pickle.loads(pickle.dumps(array))
    assert Burglar.entered, "the trap works"
    Burglar.entered = False
    for columns in (["g"], ["x"]):
        with pytest.raises(TableError, match="array 'g' holds pickled Python objects"):
            read_table(tmp_path / "a.npz", columns)
    assert not Burglar.entered


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((2, 2))}, r"array 'x' has shape \(2, 2\)"),
        ({"x": np.float64(3)}, r"array 'x' has shape \(\)"),
        ({"x": np.ones(2, complex)}, "holds complex128"),
        ({"x": np.ones(2), "y": np.ones(3)}, "array 'y' has 3 entries, 'x' has 2"),
    ],
)
def test_npz_arrays_that_are_no_columns(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(TableError, match=message):
        read_table(tmp_path / "a.npz", list(arrays))


def test_a_zip_archive_of_other_things_is_no_npz(tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("x", "hello")
    with pytest.raises(TableError, match="'x'"):
        read_table(csv_file(tmp_path, content.getvalue(), "a.npz"), ["x"])


def test_an_output_folder_that_is_missing_is_told(tmp_path):
    with pytest.raises(TableError, match="there is no folder"):
        write_table(tmp_path / "absent" / "a.csv", {"x": [1]})
