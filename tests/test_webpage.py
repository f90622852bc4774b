"""What the HTML pages share."""

import pathlib

from launch import ROOT

from megatron_retro import webpage


def test_what_goes_into_a_page_is_not_filled_again(tmp_path: pathlib.Path) -> None:
    template = tmp_path / "page.html"
    template.write_text("<style>{{style}}</style>{{body}}{{body}}", encoding="utf-8")
    html = webpage.fill(template, style="{{body}}", body=r"{{style}} \1 {{other}}")
    assert html == r"<style>{{body}}</style>{{style}} \1 {{other}}{{style}} \1 {{other}}"


def test_a_pages_own_style_comes_last(tmp_path: pathlib.Path) -> None:
    (tmp_path / "page.css").write_text("body { max-width: 5rem; }", encoding="utf-8")
    style = webpage.style(tmp_path / "page.html")
    assert style.startswith(":root {") and style.index("max-width: 100rem") < style.index("max-width: 5rem")


def test_what_pages_are_made_of_is_installed_with_the_package() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    files = [path for suffix in ("css", "html", "js") for path in (ROOT / "megatron_retro").rglob(f"*.{suffix}")]
    assert len(files) == 9 and all(f'"{path.name}"' in setup for path in files)
