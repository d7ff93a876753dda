"""Class names and templates: what a user may write, and what is said of mistakes."""

import pytest

from pretrain.prompts import TEMPLATES, load_classes, load_templates, words_of


def test_published_sets_have_their_numbers():
    assert len(TEMPLATES["openai_kinetics"]) == 28 and len(TEMPLATES["openai_ucf101"]) == 48
    for templates in TEMPLATES.values():
        assert len(set(templates)) == len(templates)
        assert all(t.count("{}") == 1 for t in templates)
    assert "a example of a person practicing {}." in TEMPLATES["openai_kinetics"]
    assert "a example of the person during {}." in TEMPLATES["openai_ucf101"]
    assert TEMPLATES["openai_ucf101"][0] == "a photo of a person {}."


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ApplyEyeMakeup", "Apply Eye Makeup"),
        ("sit_down", "sit down"),
        ("playing  guitar", "playing guitar"),
        ("TaiChi", "Tai Chi"),
        ("YoYo", "Yo Yo"),
        ("push-up", "push up"),
        ("CPRTraining", "CPR Training"),
        ("-1", "-1"),
        ("_-_", "_-_"),
    ],
)
def test_names_become_words(name, words):
    assert words_of(name) == words


def test_classes_from_the_command_line():
    assert load_classes("drinking water, sit_down") == {
        "drinking water": "drinking water",
        "sit_down": "sit down",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a,,b", "empty name"),
        ("a, b, a", "class 'a' twice"),
        ("sit_down, sit down", "'sit_down' and 'sit down'"),
        ("walks, sit down, Sit_Down", "'sit down' and 'Sit_Down'"),
        ("SitDown, sit-down, walks", "'SitDown' and 'sit-down'"),
        ("cafe\u0301, caf\u00e9", "same words"),
        ("names.txt", "no such file"),
    ],
)
def test_bad_classes_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        load_classes(given)


def test_classes_from_files(tmp_path):
    plain = tmp_path / "names.txt"
    plain.write_text("\nwalks\n\n  sits down \n")
    assert load_classes(str(plain)) == {"walks": "walks", "sits down": "sits down"}
    table = tmp_path / "names.csv"
    table.write_text('label,text\nsit,"sits down, slowly"\nwave,\n')
    assert load_classes(str(table)) == {"sit": "sits down, slowly", "wave": "wave"}
    table.write_text("label,text\na,sits down\nb,Sits  down\n")
    with pytest.raises(ValueError, match="'a' and 'b'"):
        load_classes(str(table))
    table.write_text("label,text\nsit,sits down, slowly\n")
    with pytest.raises(ValueError, match=r"names\.csv:2: .*quotes"):
        load_classes(str(table))
    plain.write_text("\n\n")
    with pytest.raises(ValueError, match="names no class"):
        load_classes(str(plain))
    plain.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        load_classes(str(plain))


def test_numbers_are_no_spellings_of_one_another():
    assert list(load_classes("-1, 1, 01, +1")) == ["-1", "1", "01", "+1"]


def test_templates_from_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a clip of {}.\n\n{}\n")
    assert load_templates(str(path)) == ("a clip of {}.", "{}")
    other = tmp_path / "bad.txt"
    other.write_text("{}\na clip of something\n")
    with pytest.raises(ValueError, match=r"bad\.txt:2: .*one \{\}"):
        load_templates(str(other))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="no template"):
        load_templates(str(empty))
    with pytest.raises(ValueError, match="plain"):
        load_templates("openai_imagenet")


def test_more_classes_than_a_path_has_characters(tmp_path):
    names = [f"class {i}" for i in range(2000)]
    assert list(load_classes(", ".join(names))) == names
    with pytest.raises(ValueError, match="neither a file"):
        load_templates("a person " * 1000)
    (tmp_path / "c.csv").write_text("label,text\n" + "x" * 200_000)
    with pytest.raises(ValueError, match=r"c\.csv cannot be read"):
        load_classes(str(tmp_path / "c.csv"))


@pytest.mark.parametrize("load", [load_templates, load_classes])
def test_a_file_that_is_too_large_is_refused(tmp_path, load):
    path = tmp_path / "list.txt"
    with open(path, "wb") as file:
        file.truncate(2**26 + 1)  # of zeros that take no room
    with pytest.raises(ValueError, match="longer than"):
        load(str(path))
