"""Writes measured tables into a page, between two marks; the rest of the page stays as it is."""


def replace_between(page, name, text):
    """Returns a page's text with `text` between `<!-- NAME -->` and `<!-- end of NAME -->`.

    Args:
        page: the text of a Markdown file.
        name: of the section.
        text: Markdown, without the last end of line.

    Raises:
        ValueError: the page lacks one of the marks, or has it twice.
    """
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"expected {begin.strip()} and {end.strip()} once each")
    return page.partition(begin)[0] + begin + text + end + page.partition(end)[2]


def renew_page(page, name, text):
    """Writes the result of `replace_between` to the file at `page`, a pathlib.Path."""
    page.write_text(replace_between(page.read_text(encoding="utf-8"), name, text), encoding="utf-8")
