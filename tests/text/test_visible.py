"""Hidden characters are shown, and all else stays as it is."""

from hypothesis import given
from hypothesis import strategies as st

from bae.text.visible import shortened, visible


def test_what_a_reader_sees_stays():
    text = "x² ≤ 5,\n\t中文 é 🙂 <b>&amp;</b> \\frac{1}{2}"
    assert visible(text) == text


def test_what_would_be_obeyed_is_shown_by_its_number():
    assert visible("\x1b[31m\r\0\x7f\x85") == "⟨U+001B⟩[31m⟨U+000D⟩⟨U+0000⟩⟨U+007F⟩⟨U+0085⟩"
    assert visible("a\u202eb\u2066c\u200bd\ufeffe\u2028f") == (
        "a⟨U+202E⟩b⟨U+2066⟩c⟨U+200B⟩d⟨U+FEFF⟩e⟨U+2028⟩f"  # bidirectional, of no width, a line break
    )
    assert visible("\ud800 and \U000e0041") == "⟨U+D800⟩ and ⟨U+E0041⟩"


@given(st.text(st.characters(codec=None, categories=None)))
def test_the_result_can_be_encoded_and_stays_as_it_is(text):
    shown = visible(text)
    assert shown.encode().decode() == shown == visible(shown)


def test_the_middle_of_a_long_text_is_left_out():
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefghi", 6) == "abcd … 3 characters left out … hi"
    assert len(shortened("x" * 10**6, 100)) < 150
