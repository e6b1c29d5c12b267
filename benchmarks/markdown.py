"""Write a section of a Markdown page between two marks, and leave the rest of the page as it is."""

from pathlib import Path

BEGIN, END = "<!-- benchmarks/dispatch.py: begin -->", "<!-- benchmarks/dispatch.py: end -->"


def write_section(path: str, text: str) -> None:
    """Replace the text between the marks in a file, or append it with its marks."""
    file = Path(path)
    old = file.read_text(encoding="utf-8") if file.exists() else ""
    section = f"{BEGIN}\n{text}\n{END}"
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        file.write_text(before + section + after, encoding="utf-8")
    else:
        file.write_text(f"{old.rstrip()}\n\n{section}\n".lstrip(), encoding="utf-8")
