"""Writes measured tables into a page, between two marks; the rest of the page stays as it is."""


def renew_page(page, name, text):
    """Replaces what stands between `<!-- NAME -->` and `<!-- end of NAME -->`.

    Args:
        page: pathlib.Path of a Markdown file.
        name: of the section.
        text: Markdown, without the last end of line.
    """
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    page.write_text(f"{before}{mark}{text}\n{end}{after}", encoding="utf-8")
