"""Results as one line, as a short table, and as HTML."""

from __future__ import annotations

from coprune.base.words import Cell, Sheet, Shown


class Figures(Shown):
    """Two figures."""

    def headline(self) -> str:
        return "a <model>"

    def sheet(self) -> Sheet:
        return Sheet(self.headline(), [("size", "1 & 2"), ("perplexity", "3")])


class Columns(Shown):
    """A table."""

    def headline(self) -> str:
        return "a table"

    def sheet(self) -> Sheet:
        return Sheet("several", [("size", "1", "2")], ("", "a", "b"))


def test_repr_is_one_line_and_print_shows_a_few() -> None:
    assert repr(Figures()) == "<Figures of a <model>>"
    assert str(Figures()).splitlines() == ["size      1 & 2", "perplexity 3"]


def test_a_notebook_shows_a_table_with_every_text_escaped() -> None:
    html = Figures()._repr_html_()
    assert html.startswith("<table><caption>a &lt;model&gt;</caption><tbody><tr><th")
    assert ">size</th><td>1 &amp; 2</td></tr>" in html
    assert "<model>" not in html


def test_columns_are_named() -> None:
    assert "<tr><th></th><th>a</th><th>b</th></tr>" in Columns()._repr_html_()
    assert Columns()._repr_html_().endswith(">size</th><td>1</td><td>2</td></tr></tbody></table>")


def test_columns_are_aligned() -> None:
    sheet = Sheet("several", [("size", "1", "22222"), ("perplexity", "333", "")], ("", "a", "b"))
    assert sheet.lines() == ["              a      b", "size          1  22222", "perplexity  333"]


def test_cells_can_be_bold_and_link_to_a_page() -> None:
    sheet = Sheet("", [(Cell("a|b", link="a.html"), Cell("<1>", strong=True))], ("run", "loss"))
    assert '<a href="a.html">a|b</a></td><td><b>&lt;1&gt;</b></td>' in sheet.html()
    assert sheet.markdown().splitlines() == ["| run | loss |", "| --- | ---: |", "| a\\|b | **\\<1\\>** |"]
